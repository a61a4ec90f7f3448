#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <optional>

#include "common/call_operator.h"

namespace torch_moe_ep {
namespace {

// Cast as a matmul would be: the GEMMs' operands to autocast's dtype (weights once per autocast
// region, by its cache). Row weights stay fp32, as the operator wants them in every dtype.
template <c10::DeviceType kDevice>
at::Tensor expert_mlp_autocast(const at::Tensor& rows,
                               const at::Tensor& row_weights,
                               const at::Tensor& expert_offsets,
                               const at::Tensor& host_offsets,
                               const at::Tensor& gate_up,
                               const at::Tensor& down,
                               double weight_grad_scale,
                               int64_t slots_per_pass,
                               bool recompute_gate_up,
                               const std::optional<at::Tensor>& x,
                               const std::optional<at::Tensor>& slot_of_copy,
                               const std::optional<at::Tensor>& counts,
                               int64_t top_k,
                               int64_t row_alignment,
                               const std::optional<at::Tensor>& main_grad_gate_up,
                               const std::optional<at::Tensor>& main_grad_down) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  std::optional<at::Tensor> cast_x = x;
  if (x.has_value()) cast_x = at::autocast::cached_cast(dtype, *x, kDevice);
  return call_operator<"expert_mlp", at::Tensor>(at::autocast::cached_cast(dtype, rows, kDevice),
                                                 row_weights,
                                                 expert_offsets,
                                                 host_offsets,
                                                 at::autocast::cached_cast(dtype, gate_up, kDevice),
                                                 at::autocast::cached_cast(dtype, down, kDevice),
                                                 weight_grad_scale,
                                                 slots_per_pass,
                                                 recompute_gate_up,
                                                 cast_x,
                                                 slot_of_copy,
                                                 counts,
                                                 top_k,
                                                 row_alignment,
                                                 main_grad_gate_up,
                                                 main_grad_down);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, AutocastCPU, m) {
  m.impl("expert_mlp", &expert_mlp_autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(torch_moe_ep, AutocastCUDA, m) {
  m.impl("expert_mlp", &expert_mlp_autocast<c10::DeviceType::CUDA>);
}

}  // namespace torch_moe_ep
