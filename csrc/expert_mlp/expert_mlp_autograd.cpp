#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

namespace torch_moe_ep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Forward and backward go through the dispatcher, so that FakeTensor and AOTAutograd trace them.
std::tuple<at::Tensor, at::Tensor> call_forward(const at::Tensor& rows,
                                                const at::Tensor& row_weights,
                                                const at::Tensor& expert_offsets,
                                                const at::Tensor& host_offsets,
                                                const at::Tensor& gate_up,
                                                const at::Tensor& down,
                                                int64_t slots_per_pass) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_moe_ep::expert_mlp_forward", "")
                             .typed<decltype(call_forward)>();
  return op.call(rows, row_weights, expert_offsets, host_offsets, gate_up, down, slots_per_pass);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> call_backward(
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
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_moe_ep::expert_mlp_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(grad_y,
                 rows,
                 row_weights,
                 z,
                 expert_offsets,
                 host_offsets,
                 gate_up,
                 down,
                 weight_grad_scale,
                 slots_per_pass);
}

class ExpertMlp : public torch::autograd::Function<ExpertMlp> {
 public:
  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& rows,
                            const at::Tensor& row_weights,
                            const at::Tensor& expert_offsets,
                            const at::Tensor& host_offsets,
                            const at::Tensor& gate_up,
                            const at::Tensor& down,
                            double weight_grad_scale,
                            int64_t slots_per_pass,
                            bool recompute_gate_up) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, z] = call_forward(
        rows, row_weights, expert_offsets, host_offsets, gate_up, down, slots_per_pass);
    // A narrowed z would keep all of it alive.
    if (recompute_gate_up) z = at::empty_symint({0, gate_up.sym_size(1)}, rows.options());
    ctx->save_for_backward({rows, row_weights, z, expert_offsets, host_offsets, gate_up, down});
    ctx->saved_data["weight_grad_scale"] = weight_grad_scale;
    ctx->saved_data["slots_per_pass"] = slots_per_pass;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    auto [grad_rows, grad_row_weights, grad_gate_up, grad_down] =
        call_backward(grad_outputs[0],
                      saved[0],
                      saved[1],
                      saved[2],
                      saved[3],
                      saved[4],
                      saved[5],
                      saved[6],
                      ctx->saved_data["weight_grad_scale"].toDouble(),
                      ctx->saved_data["slots_per_pass"].toInt());
    const at::Tensor none;
    return {grad_rows,
            grad_row_weights,
            none,  // expert_offsets
            none,  // host_offsets
            grad_gate_up,
            grad_down,
            none,   // weight_grad_scale
            none,   // slots_per_pass
            none};  // recompute_gate_up
  }
};

at::Tensor expert_mlp_autograd(const at::Tensor& rows,
                               const at::Tensor& row_weights,
                               const at::Tensor& expert_offsets,
                               const at::Tensor& host_offsets,
                               const at::Tensor& gate_up,
                               const at::Tensor& down,
                               double weight_grad_scale,
                               int64_t slots_per_pass,
                               bool recompute_gate_up) {
  return ExpertMlp::apply(rows,
                          row_weights,
                          expert_offsets,
                          host_offsets,
                          gate_up,
                          down,
                          weight_grad_scale,
                          slots_per_pass,
                          recompute_gate_up);
}

// Where the Autograd key is off (inference mode) nothing is kept, and the last two arguments, which
// are about backward, say nothing.
at::Tensor expert_mlp_inference(const at::Tensor& rows,
                                const at::Tensor& row_weights,
                                const at::Tensor& expert_offsets,
                                const at::Tensor& host_offsets,
                                const at::Tensor& gate_up,
                                const at::Tensor& down,
                                double /*weight_grad_scale*/,
                                int64_t slots_per_pass,
                                bool /*recompute_gate_up*/) {
  return std::get<0>(
      call_forward(rows, row_weights, expert_offsets, host_offsets, gate_up, down, slots_per_pass));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) {
  m.impl("expert_mlp", &expert_mlp_autograd);
  // Double backward raises instead of treating the gradients as constants.
  m.impl("expert_mlp_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CompositeExplicitAutograd, m) {
  m.impl("expert_mlp", &expert_mlp_inference);
}

}  // namespace torch_moe_ep
