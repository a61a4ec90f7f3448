#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/anomaly_mode.h>

namespace torch_moe_ep {

// Rows behind the last segment belong to nobody and hold anything. torch's anomaly mode would take
// a NaN there for a NaN of the gradient [R, ...]: under it, and only then, they are zeros.
inline at::Tensor without_unowned(const at::Tensor& grad, const at::Tensor& expert_offsets) {
  using torch::autograd::AnomalyMode;
  if (!AnomalyMode::is_enabled() || !AnomalyMode::should_check_nan()) return grad;
  const at::Tensor slots = at::arange(grad.size(0), expert_offsets.options());
  const at::Tensor is_unowned = slots.ge(expert_offsets.select(0, -1));
  return grad.masked_fill(grad.dim() == 2 ? is_unowned.unsqueeze(1) : is_unowned, 0);
}

}  // namespace torch_moe_ep
