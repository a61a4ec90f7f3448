#include "chunks/expert_calls.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace torch_moe_ep {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using T = const at::Tensor&;
using Maybe = const std::optional<at::Tensor>&;

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

Two call_expert_mlp_forward(const at::Tensor& rows,
                            const at::Tensor& row_weights,
                            const ExpertSegments& segments,
                            const at::Tensor& gate_up,
                            const at::Tensor& down,
                            int64_t slots_per_pass) {
  static const auto op =
      find_operator<Two(T, T, T, T, T, T, int64_t)>("torch_moe_ep::expert_mlp_forward");
  return op.call(rows,
                 row_weights,
                 segments.expert_offsets,
                 segments.host_offsets,
                 gate_up,
                 down,
                 slots_per_pass);
}

Four call_expert_mlp_backward(const at::Tensor& grad_y,
                              const at::Tensor& rows,
                              const at::Tensor& row_weights,
                              const at::Tensor& z,
                              const ExpertSegments& segments,
                              const at::Tensor& gate_up,
                              const at::Tensor& down,
                              double weight_grad_scale,
                              int64_t slots_per_pass) {
  static const auto op = find_operator<Four(T, T, T, T, T, T, T, T, double, int64_t)>(
      "torch_moe_ep::expert_mlp_backward");
  return op.call(grad_y,
                 rows,
                 row_weights,
                 z,
                 segments.expert_offsets,
                 segments.host_offsets,
                 gate_up,
                 down,
                 weight_grad_scale,
                 slots_per_pass);
}

InputGradients call_input_grads(const at::Tensor& grad_y,
                                const std::optional<at::Tensor>& rows,
                                const at::Tensor& row_weights,
                                const std::optional<at::Tensor>& z,
                                const ExpertSegments& segments,
                                const at::Tensor& gate_up,
                                const at::Tensor& down) {
  static const auto op =
      find_operator<Four(T, Maybe, T, Maybe, T, T, T, T)>("torch_moe_ep::expert_mlp_input_grads");
  auto [grad_rows, grad_row_weights, grad_z, activation] = op.call(
      grad_y, rows, row_weights, z, segments.expert_offsets, segments.host_offsets, gate_up, down);
  return {grad_rows, grad_row_weights, grad_z, activation};
}

Two call_weight_grads(const at::Tensor& grad_y,
                      const at::Tensor& rows,
                      const at::Tensor& grad_z,
                      const at::Tensor& activation,
                      const ExpertSegments& segments,
                      double weight_grad_scale) {
  static const auto op =
      find_operator<Two(T, T, T, T, T, T, double)>("torch_moe_ep::expert_mlp_weight_grads");
  return op.call(grad_y,
                 rows,
                 grad_z,
                 activation,
                 segments.expert_offsets,
                 segments.host_offsets,
                 weight_grad_scale);
}

}  // namespace torch_moe_ep
