#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "expert_mlp/expert_gemms.h"
#include "expert_mlp/expert_mlp.h"

namespace torch_moe_ep {
namespace {

// One run of consecutive slots with the expert segments cut to it.
struct Pass {
  int64_t first;
  int64_t count;
  at::Tensor expert_offsets;  // relative to `first`
  at::Tensor host_offsets;    // likewise, or empty
};

at::Tensor cut(const at::Tensor& offsets, int64_t first, int64_t count) {
  return offsets.sub(first).clamp_(0, count);
}

// slots_per_pass 0 means one pass. Cuts fall on multiples of kRowAlignment, as the GEMMs need; the
// offsets are cut on the device, so that passes cost no host sync.
std::vector<Pass> passes_of(int64_t num_slots,
                            int64_t slots_per_pass,
                            const at::Tensor& expert_offsets,
                            const at::Tensor& host_offsets) {
  if (slots_per_pass <= 0 || slots_per_pass >= num_slots) {
    return {{0, num_slots, expert_offsets, host_offsets}};
  }
  const int64_t step = (slots_per_pass + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  std::vector<Pass> passes;
  for (int64_t first = 0; first < num_slots; first += step) {
    const int64_t count = std::min(step, num_slots - first);
    passes.push_back({first,
                      count,
                      cut(expert_offsets, first, count),
                      host_offsets.numel() > 0 ? cut(host_offsets, first, count) : host_offsets});
  }
  return passes;
}

// A weight gradient over the passes: one pass keeps its tensor, several are summed in fp32 and
// rounded once; with a main_grad all are added there.
class WeightGradient {
 public:
  explicit WeightGradient(at::Tensor main_grad) : main_grad_(std::move(main_grad)) {}

  void add(ExpertGemms& gemms, const at::Tensor& rows_a, const at::Tensor& rows_b, double scale) {
    if (main_grad_.defined()) {
      gemms.tn_add(rows_a, rows_b, scale, main_grad_);
      return;
    }
    at::Tensor part = gemms.tn(rows_a, rows_b, scale);
    if (!sum_.defined()) {
      sum_ = std::move(part);
      return;
    }
    if (sum_.scalar_type() != at::kFloat) sum_ = sum_.to(at::kFloat);
    sum_.add_(part);
  }
  // Undefined with a main_grad.
  at::Tensor get(at::ScalarType dtype) const { return sum_.defined() ? sum_.to(dtype) : sum_; }

 private:
  at::Tensor main_grad_;
  at::Tensor sum_;
};

// What both forms of backward take; main_grads undefined or both defined.
struct BackwardInputs {
  const at::Tensor& grad_y;
  const at::Tensor& rows;
  const at::Tensor& row_weights;
  const at::Tensor& z;
  const at::Tensor& expert_offsets;
  const at::Tensor& host_offsets;
  const at::Tensor& gate_up;
  const at::Tensor& down;
  double weight_grad_scale;
  int64_t slots_per_pass;
  at::Tensor main_grad_gate_up = {};
  at::Tensor main_grad_down = {};
};

struct Gradients {
  at::Tensor rows;
  at::Tensor row_weights;
  at::Tensor gate_up;  // undefined with main_grads
  at::Tensor down;
};

Gradients backward(const BackwardInputs& in) {
  check_expert_mlp(
      in.rows, in.row_weights, in.expert_offsets, in.host_offsets, in.gate_up, in.down);
  check_expert_mlp_backward(in.grad_y, in.rows, in.z, in.gate_up);
  const c10::cuda::CUDAGuard guard(in.rows.device());
  const at::Tensor grad_y = in.grad_y.contiguous(), rows = in.rows.contiguous();
  const at::Tensor row_weights = in.row_weights.contiguous();
  const at::Tensor gate_up = in.gate_up.contiguous(), down = in.down.contiguous();
  Gradients gradients;
  gradients.row_weights = at::empty(row_weights.sizes(), row_weights.options());
  WeightGradient grad_gate_up(in.main_grad_gate_up);
  WeightGradient grad_down(in.main_grad_down);
  const auto passes =
      passes_of(rows.size(0), in.slots_per_pass, in.expert_offsets, in.host_offsets);
  for (const Pass& pass : passes) {
    const auto of_pass = [&pass](const at::Tensor& tensor) {
      return tensor.narrow(0, pass.first, pass.count);
    };
    ExpertGemms gemms(pass.expert_offsets, pass.host_offsets);
    const at::Tensor pass_rows = of_pass(rows), pass_grad = of_pass(grad_y);
    const bool has_z = in.z.size(0) == rows.size(0) && passes.size() == 1;
    const at::Tensor z = has_z ? in.z : gemms.nt(pass_rows, gate_up);
    const ExpertGemms::SwigluGradients hidden = gemms.nn_swiglu_backward(
        pass_grad, down, z, of_pass(row_weights), of_pass(gradients.row_weights));
    grad_down.add(gemms, pass_grad, hidden.activation, in.weight_grad_scale);
    grad_gate_up.add(gemms, hidden.grad_z, pass_rows, in.weight_grad_scale);
    const at::Tensor pass_grad_rows = gemms.nn(hidden.grad_z, gate_up);
    if (passes.size() == 1) {
      gradients.rows = pass_grad_rows;
    } else {
      if (!gradients.rows.defined()) gradients.rows = at::empty(rows.sizes(), rows.options());
      of_pass(gradients.rows).copy_(pass_grad_rows);
    }
  }
  gradients.gate_up = grad_gate_up.get(gate_up.scalar_type());
  gradients.down = grad_down.get(down.scalar_type());
  return gradients;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> expert_mlp_forward_cuda(const at::Tensor& rows,
                                                           const at::Tensor& row_weights,
                                                           const at::Tensor& expert_offsets,
                                                           const at::Tensor& host_offsets,
                                                           const at::Tensor& gate_up,
                                                           const at::Tensor& down,
                                                           int64_t slots_per_pass) {
  check_expert_mlp(rows, row_weights, expert_offsets, host_offsets, gate_up, down);
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor dense_rows = rows.contiguous();
  const at::Tensor dense_weights = row_weights.contiguous();
  const at::Tensor dense_gate_up = gate_up.contiguous();
  const at::Tensor dense_down = down.contiguous();
  const auto passes = passes_of(rows.size(0), slots_per_pass, expert_offsets, host_offsets);
  if (passes.size() == 1) {
    ExpertGemms gemms(expert_offsets, host_offsets);
    ExpertGemms::GateUp hidden = gemms.nt_swiglu(dense_rows, dense_gate_up, dense_weights);
    return {gemms.nt(hidden.activation, dense_down), hidden.z};
  }
  at::Tensor y = at::empty(dense_rows.sizes(), rows.options());
  for (const Pass& pass : passes) {
    ExpertGemms gemms(pass.expert_offsets, pass.host_offsets);
    const at::Tensor activation = gemms
                                      .nt_swiglu(dense_rows.narrow(0, pass.first, pass.count),
                                                 dense_gate_up,
                                                 dense_weights.narrow(0, pass.first, pass.count))
                                      .activation;
    y.narrow(0, pass.first, pass.count).copy_(gemms.nt(activation, dense_down));
  }
  return {y, at::empty({0, gate_up.size(1)}, rows.options())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_mlp_backward_cuda(
    const at::Tensor& grad_y,
    const at::Tensor& rows,
    const at::Tensor& row_weights,
    const at::Tensor& z,
    const at::Tensor& expert_offsets,
    const at::Tensor& host_offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    double weight_grad_scale,
    int64_t slots_per_pass) {
  const Gradients gradients = backward({grad_y,
                                        rows,
                                        row_weights,
                                        z,
                                        expert_offsets,
                                        host_offsets,
                                        gate_up,
                                        down,
                                        weight_grad_scale,
                                        slots_per_pass});
  return {gradients.rows, gradients.row_weights, gradients.gate_up, gradients.down};
}

std::tuple<at::Tensor, at::Tensor> expert_mlp_backward_add_cuda(const at::Tensor& grad_y,
                                                                const at::Tensor& rows,
                                                                const at::Tensor& row_weights,
                                                                const at::Tensor& z,
                                                                const at::Tensor& expert_offsets,
                                                                const at::Tensor& host_offsets,
                                                                const at::Tensor& gate_up,
                                                                const at::Tensor& down,
                                                                double weight_grad_scale,
                                                                int64_t slots_per_pass,
                                                                at::Tensor& main_grad_gate_up,
                                                                at::Tensor& main_grad_down) {
  check_main_grads(main_grad_gate_up, main_grad_down, gate_up, down);
  const Gradients gradients = backward({grad_y,
                                        rows,
                                        row_weights,
                                        z,
                                        expert_offsets,
                                        host_offsets,
                                        gate_up,
                                        down,
                                        weight_grad_scale,
                                        slots_per_pass,
                                        main_grad_gate_up,
                                        main_grad_down});
  return {gradients.rows, gradients.row_weights};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_mlp_input_grads_cuda(
    const at::Tensor& grad_y,
    const std::optional<at::Tensor>& rows,
    const at::Tensor& row_weights,
    const std::optional<at::Tensor>& z,
    const at::Tensor& expert_offsets,
    const at::Tensor& host_offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down) {
  check_expert_mlp(grad_y, row_weights, expert_offsets, host_offsets, gate_up, down);
  const at::Tensor source = checked_rows_or_z(grad_y, rows, z, gate_up);
  const c10::cuda::CUDAGuard guard(grad_y.device());
  const at::Tensor dense_weights = row_weights.contiguous();
  const at::Tensor dense_gate_up = gate_up.contiguous();
  at::Tensor grad_row_weights = at::empty(dense_weights.sizes(), dense_weights.options());
  ExpertGemms gemms(expert_offsets, host_offsets);
  const at::Tensor dense_z =
      z.has_value() ? source.contiguous() : gemms.nt(source.contiguous(), dense_gate_up);
  const ExpertGemms::SwigluGradients hidden = gemms.nn_swiglu_backward(
      grad_y.contiguous(), down.contiguous(), dense_z, dense_weights, grad_row_weights);
  return {
      gemms.nn(hidden.grad_z, dense_gate_up), grad_row_weights, hidden.grad_z, hidden.activation};
}

std::tuple<at::Tensor, at::Tensor> expert_mlp_weight_grads_cuda(const at::Tensor& grad_y,
                                                                const at::Tensor& rows,
                                                                const at::Tensor& grad_z,
                                                                const at::Tensor& activation,
                                                                const at::Tensor& expert_offsets,
                                                                const at::Tensor& host_offsets,
                                                                double weight_grad_scale) {
  check_expert_mlp_weight_grads(grad_y, rows, grad_z, activation, expert_offsets);
  const c10::cuda::CUDAGuard guard(rows.device());
  ExpertGemms gemms(expert_offsets, host_offsets);
  const at::Tensor grad_down =
      gemms.tn(grad_y.contiguous(), activation.contiguous(), weight_grad_scale);
  return {gemms.tn(grad_z.contiguous(), rows.contiguous(), weight_grad_scale), grad_down};
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) {
  m.impl("expert_mlp_forward", &expert_mlp_forward_cuda);
  m.impl("expert_mlp_backward", &expert_mlp_backward_cuda);
  m.impl("expert_mlp_backward_add", &expert_mlp_backward_add_cuda);
  m.impl("expert_mlp_input_grads", &expert_mlp_input_grads_cuda);
  m.impl("expert_mlp_weight_grads", &expert_mlp_weight_grads_cuda);
}

}  // namespace torch_moe_ep
