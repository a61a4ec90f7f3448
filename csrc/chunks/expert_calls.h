// The operators of expert_mlp, called by name, with what comes back named.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace torch_moe_ep {

struct ExpertSegments {
  at::Tensor expert_offsets;
  at::Tensor host_offsets;
};

// y [R, H] and z [R, 2I], or [0, 2I] in several passes.
std::tuple<at::Tensor, at::Tensor> call_expert_mlp_forward(const at::Tensor& rows,
                                                           const at::Tensor& row_weights,
                                                           const ExpertSegments& segments,
                                                           const at::Tensor& gate_up,
                                                           const at::Tensor& down,
                                                           int64_t slots_per_pass);

// Gradients of rows, row weights, gate_up and down.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> call_expert_mlp_backward(
    const at::Tensor& grad_y,
    const at::Tensor& rows,
    const at::Tensor& row_weights,
    const at::Tensor& z,
    const ExpertSegments& segments,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    double weight_grad_scale,
    int64_t slots_per_pass);

struct InputGradients {
  at::Tensor rows;
  at::Tensor row_weights;
  at::Tensor z;
  at::Tensor activation;  // no gradient: what the gradient of down is made of
};

InputGradients call_input_grads(const at::Tensor& grad_y,
                                const std::optional<at::Tensor>& rows,
                                const at::Tensor& row_weights,
                                const std::optional<at::Tensor>& z,
                                const ExpertSegments& segments,
                                const at::Tensor& gate_up,
                                const at::Tensor& down);

// Gradients of gate_up and down.
std::tuple<at::Tensor, at::Tensor> call_weight_grads(const at::Tensor& grad_y,
                                                     const at::Tensor& rows,
                                                     const at::Tensor& grad_z,
                                                     const at::Tensor& activation,
                                                     const ExpertSegments& segments,
                                                     double weight_grad_scale);

}  // namespace torch_moe_ep
