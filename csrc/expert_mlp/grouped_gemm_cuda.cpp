// One grouped GEMM as an operator, so that tests and benchmarks reach a single layout and both
// forms of SwiGLU's gradient; the layer goes through ExpertGemms.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "expert_mlp/expert_gemms.h"
#include "expert_mlp/mlp_operators.h"
#include "expert_mlp/sm90/choose_tile.h"

namespace torch_moe_ep {
namespace {

void check_layout(const std::string& layout) {
  TORCH_CHECK_VALUE(layout == "NT" || layout == "NN" || layout == "TN",
                    "layout must be NT, NN or TN, got ",
                    layout);
}

// a is [R, K] (TN: [R, M]) in every layout; what b must be, as grouped_gemm.h has it.
void check_operands(const at::Tensor& a,
                    const at::Tensor& b,
                    const at::Tensor& expert_offsets,
                    int64_t num_chunks,
                    const std::string& layout) {
  check_layout(layout);
  check_dim(a, "a", 2, "[rows, columns]");
  check_element_type(a, "a");
  check_int64(expert_offsets, "expert_offsets");
  check_same_device(expert_offsets, "expert_offsets", a, "a");
  check_same_device(b, "b", a, "a");
  TORCH_CHECK_VALUE(expert_offsets.dim() == 1 && expert_offsets.size(0) > num_chunks &&
                        (expert_offsets.size(0) - 1) % num_chunks == 0,
                    "expert_offsets must be [experts * num_chunks + 1], got shape ",
                    expert_offsets.sizes());
  const bool is_tn = layout == "TN";
  check_dim(b, "b", is_tn ? 2 : 3, is_tn ? "[rows, columns]" : "[experts, ., .]");
  TORCH_CHECK_VALUE(b.scalar_type() == a.scalar_type(),
                    "b must have a's dtype ",
                    a.scalar_type(),
                    ", got ",
                    b.scalar_type());
  const bool fits = is_tn ? b.size(0) == a.size(0)
                          : b.size(0) == (expert_offsets.size(0) - 1) / num_chunks &&
                                b.size(layout == "NT" ? 2 : 1) == a.size(1);
  TORCH_CHECK_VALUE(fits,
                    "b of shape ",
                    b.sizes(),
                    " does not fit a of shape ",
                    a.sizes(),
                    " in layout ",
                    layout,
                    " (NT: b [experts, N, K]; NN: b [experts, K, N]; TN: b [rows, N])");
}

at::Tensor grouped_gemm_cuda(const at::Tensor& a,
                             const at::Tensor& b,
                             const at::Tensor& expert_offsets,
                             const std::string& layout,
                             int64_t num_chunks,
                             int64_t chunk,
                             std::optional<int64_t> max_shared_bytes) {
  check_chunk(chunk, num_chunks);
  check_operands(a, b, expert_offsets, num_chunks, layout);
  const c10::cuda::CUDAGuard guard(a.device());
  const at::Tensor left = a.contiguous(), right = b.contiguous();
  ExpertGemms gemms(one_chunk(expert_offsets, at::empty({0}, at::kLong), num_chunks, chunk));
  if (max_shared_bytes) gemms.limit_shared_bytes(static_cast<int>(*max_shared_bytes));
  if (layout == "NT") return gemms.nt(left, right);
  return layout == "NN" ? gemms.nn(left, right) : gemms.tn(left, right, 1.0);
}

// is_fused: in the GEMM's epilogue, or by a kernel of its own.
std::tuple<at::Tensor, at::Tensor, at::Tensor> swiglu_backward_gemm_cuda(
    const at::Tensor& grad_y,
    const at::Tensor& down,
    const at::Tensor& z,
    const at::Tensor& row_weights,
    const at::Tensor& expert_offsets,
    bool is_fused) {
  check_operands(grad_y, down, expert_offsets, 1, "NN");
  check_dim(z, "z", 2, "[rows, 2 * width]");
  TORCH_CHECK_VALUE(z.size(0) == grad_y.size(0) && z.size(1) == 2 * down.size(2) &&
                        row_weights.numel() == grad_y.size(0),
                    "z must be [",
                    grad_y.size(0),
                    ", ",
                    2 * down.size(2),
                    "] and row_weights as long, got shapes ",
                    z.sizes(),
                    " and ",
                    row_weights.sizes());
  check_float32(row_weights, "row_weights");
  const c10::cuda::CUDAGuard guard(grad_y.device());
  const at::Tensor grad_row_weights = at::empty(row_weights.sizes(), row_weights.options());
  ExpertGemms gemms({expert_offsets, at::empty({0}, at::kLong)});
  const ExpertGemms::SwigluGradients found = gemms.nn_swiglu_backward(grad_y.contiguous(),
                                                                      down.contiguous(),
                                                                      z.contiguous(),
                                                                      row_weights.contiguous(),
                                                                      grad_row_weights,
                                                                      {},
                                                                      is_fused);
  return {found.grad_z, found.activation, grad_row_weights};
}

GemmLayout layout_of(const std::string& layout) {
  if (layout == "NT") return GemmLayout::kNT;
  return layout == "NN" ? GemmLayout::kNN : GemmLayout::kTN;
}

GemmEpilogue epilogue_of(const std::string& epilogue) {
  TORCH_CHECK_VALUE(epilogue == "plain" || epilogue == "swiglu" || epilogue == "swiglu_backward",
                    "epilogue must be plain, swiglu or swiglu_backward, got ",
                    epilogue);
  if (epilogue == "plain") return GemmEpilogue::kPlain;
  return epilogue == "swiglu" ? GemmEpilogue::kSwiglu : GemmEpilogue::kSwigluBackward;
}

// Looks at no device. Empty where the epilogue of SwiGLU's gradient is not used.
std::vector<int64_t> grouped_gemm_tile(const std::string& layout,
                                       int64_t num_experts,
                                       int64_t rows,
                                       int64_t columns,
                                       int64_t a_columns,
                                       const std::string& epilogue,
                                       int64_t num_chunks) {
  check_layout(layout);
  check_chunk(0, num_chunks);
  const GroupedGemmShape shape = {
      layout_of(layout), num_experts, rows, columns, a_columns, epilogue_of(epilogue), num_chunks};
  if (shape.epilogue == GemmEpilogue::kSwigluBackward && !sm90::fuses_swiglu_backward(shape)) {
    return {};
  }
  const sm90::TileConfig tile = sm90::choose_tile(shape);
  return {tile.block_m,
          tile.block_n,
          static_cast<int64_t>(tile.is_ping_pong),
          tile.cluster_m,
          tile.cluster_n,
          static_cast<int64_t>(tile.keeps_b)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) {
  m.impl("grouped_gemm", &grouped_gemm_cuda);
  m.impl("swiglu_backward_gemm", &swiglu_backward_gemm_cuda);
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CompositeExplicitAutograd, m) {
  m.impl("grouped_gemm_tile", &grouped_gemm_tile);
}

}  // namespace torch_moe_ep
