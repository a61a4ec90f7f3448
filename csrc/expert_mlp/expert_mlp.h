// expert_mlp: the SwiGLU MLP of every local expert over the slots of its segment.
//
// R slots, H hidden, I expert width, L local experts. Expert l owns the slots
// [expert_offsets[l], expert_offsets[l + 1]). With z = rows gate_up[l]^T, gate = z[:I], up = z[I:]:
//   a = row_weights * silu(gate) * up        y = a down[l]^T
// The row weight is applied before down, not after: combine is then a plain sum, and backward has
// the row weight's gradient without another GEMM.
//
// expert_mlp_forward(...) ->
//   y [R, H]                     of rows' dtype.
//   z [R, 2I]                    what backward reads; [0, 2I] when computed in several passes.
// expert_mlp_backward(grad_y [R, H], ..., z [R, 2I] or [0, 2I], ...) ->
//   grad_rows [R, H], grad_row_weights [R] fp32, grad_gate_up [L, 2I, H], grad_down [L, H, I]
//   z [0, 2I] is computed again. Both weight gradients are multiplied by weight_grad_scale, here
//   and nowhere else; that of an expert without slots is exactly zero. Without needs_weight_grads
//   (frozen experts) they are not computed and come back as [0].
// expert_mlp_backward_add(..., main_grad_gate_up, main_grad_down) -> grad_rows, grad_row_weights
//   adds the weight gradients to fp32 tensors of the weights' shapes, contiguous, in place; on CUDA
//   the hand-written kernels add their fp32 sums without rounding them first.
// expert_mlp is forward as a differentiable operator: it keeps its inputs and z for backward, and
// with recompute_gate_up its inputs alone. Given x and the parts of the plan (P = 1) it keeps x in
// place of rows, and backward dispatches x again: the same rows to the bit.
//
// Of tokens in chunks: mlp_operators.h.
//
// rows [R, H]                    float32, bfloat16 or float16
// row_weights [R]                float32
// expert_offsets [L + 1]         int64, ascending from 0; on CUDA multiples of 128
// host_offsets [L + 1] or [0]    int64 on the CPU: expert_offsets where the host knows them
// gate_up [L, 2I, H]             of rows' dtype and device, gate rows first
// down [L, H, I]                 likewise
//
// Rows from expert_offsets[L] on belong to nobody: they are not read, what comes back in their
// place is not written, and no result depends on them.
//
// slots_per_pass > 0 bounds the intermediate tensors to about so many rows (CUDA: rounded up to
// 128). The weight gradients of 16-bit types are then summed over the passes in fp32 and rounded
// once. SwiGLU's arithmetic is fp32 with one rounding to the storage dtype.
//
// Not collective. Host sync: none on CUDA, but for GEMMs that loop over experts when host_offsets
// is empty (expert_gemms.h). Deterministic: no atomics, sums in a fixed order. Once differentiable:
// backward of backward raises.
//
// A wrong dtype, shape or device raises ValueError that names the argument; wrong offsets do so on
// the CPU alone, since CUDA would have to wait for them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

#include "common/checks.h"

namespace torch_moe_ep {

inline void check_expert_weights(const at::Tensor& rows,
                                 const at::Tensor& gate_up,
                                 const at::Tensor& down,
                                 int64_t num_experts) {
  const auto check_like_rows = [&rows](const at::Tensor& tensor, const char* name) {
    TORCH_CHECK_VALUE(tensor.scalar_type() == rows.scalar_type(),
                      name,
                      " must have rows' dtype ",
                      rows.scalar_type(),
                      ", got ",
                      tensor.scalar_type(),
                      " (cast one of them, or run under autocast)");
    check_same_device(tensor, name, rows, "rows");
  };
  check_dim(gate_up, "gate_up", 3, "[local experts, 2 * width, hidden]");
  check_like_rows(gate_up, "gate_up");
  TORCH_CHECK_VALUE(
      gate_up.size(0) == num_experts && gate_up.size(1) % 2 == 0 && gate_up.size(2) == rows.size(1),
      "gate_up must be [",
      num_experts,
      ", 2 * width, ",
      rows.size(1),
      "] for expert_offsets of ",
      num_experts,
      " experts and rows of that hidden size, got shape ",
      gate_up.sizes(),
      " (pass this rank's experts, gate rows before up rows)");
  check_dim(down, "down", 3, "[local experts, hidden, width]");
  check_like_rows(down, "down");
  TORCH_CHECK_VALUE(down.size(0) == num_experts && down.size(1) == rows.size(1) &&
                        down.size(2) == gate_up.size(1) / 2,
                    "down must be [",
                    num_experts,
                    ", ",
                    rows.size(1),
                    ", ",
                    gate_up.size(1) / 2,
                    "] to follow gate_up, got shape ",
                    down.sizes(),
                    " (pass both weights of the same experts)");
}

// int64 offsets of the segments of each expert in each chunk, on rows' device and, where they are
// known, on the host.
inline void check_segment_offsets(const at::Tensor& rows,
                                  const at::Tensor& offsets,
                                  const at::Tensor& host_offsets,
                                  int64_t num_chunks) {
  check_int64(offsets, "expert_offsets");
  check_same_device(offsets, "expert_offsets", rows, "rows");
  TORCH_CHECK_VALUE(
      offsets.dim() == 1 && offsets.size(0) >= 1 && (offsets.size(0) - 1) % num_chunks == 0,
      "expert_offsets must be [local experts + 1], or [local experts * num_chunks + 1] of chunks, "
      "got shape ",
      offsets.sizes(),
      " (pass the plan's)");
  check_int64(host_offsets, "host_offsets");
  TORCH_CHECK_VALUE(host_offsets.device().is_cpu(),
                    "host_offsets must be on the CPU, got ",
                    host_offsets.device(),
                    " (call .cpu(), or pass an empty tensor)");
  TORCH_CHECK_VALUE(host_offsets.dim() == 1 &&
                        (host_offsets.size(0) == 0 || host_offsets.size(0) == offsets.size(0)),
                    "host_offsets must be [",
                    offsets.size(0),
                    "] as expert_offsets, or [0], got shape ",
                    host_offsets.sizes(),
                    " (pass the plan's, or an empty tensor)");
}

// What forward and backward have in common; looks at no tensor's values.
inline void check_expert_mlp(const at::Tensor& rows,
                             const at::Tensor& row_weights,
                             const at::Tensor& expert_offsets,
                             const at::Tensor& host_offsets,
                             const at::Tensor& gate_up,
                             const at::Tensor& down,
                             int64_t num_chunks = 1) {
  check_dim(rows, "rows", 2, "[slots, hidden]");
  check_element_type(rows, "rows");
  check_float32(row_weights, "row_weights");
  check_same_device(row_weights, "row_weights", rows, "rows");
  TORCH_CHECK_VALUE(row_weights.dim() == 1 && row_weights.size(0) == rows.size(0),
                    "row_weights must be [",
                    rows.size(0),
                    "] as rows, got shape ",
                    row_weights.sizes(),
                    " (pass what dispatch returned with rows)");
  check_segment_offsets(rows, expert_offsets, host_offsets, num_chunks);
  check_expert_weights(rows, gate_up, down, (expert_offsets.size(0) - 1) / num_chunks);
}

// What backward takes besides, after check_expert_mlp.
inline void check_expert_mlp_backward(const at::Tensor& grad_y,
                                      const at::Tensor& rows,
                                      const at::Tensor& z,
                                      const at::Tensor& gate_up) {
  TORCH_CHECK_VALUE(grad_y.sizes() == rows.sizes() && grad_y.scalar_type() == rows.scalar_type(),
                    "grad_y must be ",
                    rows.scalar_type(),
                    " ",
                    rows.sizes(),
                    " as rows, got ",
                    grad_y.scalar_type(),
                    " ",
                    grad_y.sizes(),
                    " (pass the gradient of y as it is)");
  check_same_device(grad_y, "grad_y", rows, "rows");
  TORCH_CHECK_VALUE(z.dim() == 2 && z.size(1) == gate_up.size(1) &&
                        (z.size(0) == rows.size(0) || z.size(0) == 0) &&
                        z.scalar_type() == rows.scalar_type(),
                    "z must be ",
                    rows.scalar_type(),
                    " [",
                    rows.size(0),
                    ", ",
                    gate_up.size(1),
                    "], or have no rows to be computed again, got ",
                    z.scalar_type(),
                    " ",
                    z.sizes(),
                    " (pass what expert_mlp_forward returned)");
  check_same_device(z, "z", rows, "rows");
}

// rows or z, whichever expert_mlp_input_grads_chunk was given; after check_expert_mlp for grad_y.
inline at::Tensor checked_rows_or_z(const at::Tensor& grad_y,
                                    const std::optional<at::Tensor>& rows,
                                    const std::optional<at::Tensor>& z,
                                    const at::Tensor& gate_up) {
  TORCH_CHECK_VALUE(rows.has_value() != z.has_value(),
                    "rows or z must be given, and not both, got ",
                    rows.has_value() ? "both" : "none");
  const at::Tensor& found = z.has_value() ? *z : *rows;
  const int64_t columns = z.has_value() ? gate_up.size(1) : gate_up.size(2);
  TORCH_CHECK_VALUE(found.dim() == 2 && found.size(0) == grad_y.size(0) &&
                        found.size(1) == columns && found.scalar_type() == grad_y.scalar_type(),
                    z.has_value() ? "z" : "rows",
                    " must be ",
                    grad_y.scalar_type(),
                    " [",
                    grad_y.size(0),
                    ", ",
                    columns,
                    "], got ",
                    found.scalar_type(),
                    " ",
                    found.sizes());
  check_same_device(found, z.has_value() ? "z" : "rows", grad_y, "grad_y");
  return found;
}

inline void check_expert_mlp_weight_grads(const at::Tensor& grad_y,
                                          const at::Tensor& rows,
                                          const at::Tensor& grad_z,
                                          const at::Tensor& activation) {
  check_dim(rows, "rows", 2, "[slots, hidden]");
  const auto check = [&rows](const at::Tensor& tensor, const char* name, int64_t columns) {
    TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.size(0) == rows.size(0) &&
                          tensor.size(1) == columns && tensor.scalar_type() == rows.scalar_type(),
                      name,
                      " must be ",
                      rows.scalar_type(),
                      " [",
                      rows.size(0),
                      ", ",
                      columns,
                      "], got ",
                      tensor.scalar_type(),
                      " ",
                      tensor.sizes());
    check_same_device(tensor, name, rows, "rows");
  };
  check(grad_y, "grad_y", rows.size(1));
  check_dim(activation, "activation", 2, "[slots, width]");
  check(activation, "activation", activation.size(1));
  check(grad_z, "grad_z", 2 * activation.size(1));
}

// What the accumulating backward takes besides.
inline void check_main_grads(const at::Tensor& main_grad_gate_up,
                             const at::Tensor& main_grad_down,
                             const at::Tensor& gate_up,
                             const at::Tensor& down) {
  const auto check = [](const at::Tensor& main_grad, const char* name, const at::Tensor& weight) {
    check_float32(main_grad, name);
    check_same_device(main_grad, name, weight, "its weight");
    TORCH_CHECK_VALUE(main_grad.sizes() == weight.sizes() && main_grad.is_contiguous(),
                      name,
                      " must be contiguous of its weight's shape ",
                      weight.sizes(),
                      ", got shape ",
                      main_grad.sizes(),
                      " strides ",
                      main_grad.strides(),
                      " (make it with torch.zeros)");
  };
  check(main_grad_gate_up, "main_grad_gate_up", gate_up);
  check(main_grad_down, "main_grad_down", down);
}

}  // namespace torch_moe_ep
