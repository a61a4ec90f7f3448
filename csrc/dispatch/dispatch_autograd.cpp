#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "comm/label.h"
#include "common/movement.h"

namespace torch_moe_ep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class Dispatch : public torch::autograd::Function<Dispatch> {
 public:
  static variable_list forward(AutogradContext* ctx,
                               const at::Tensor& x,
                               const std::optional<at::Tensor>& weights,
                               const Plan& plan,
                               const SendBuffer& packed) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [rows, row_weights] = call_dispatch(x, weights, plan, packed);
    save_plan(ctx, plan);
    ctx->saved_data["has_weights"] = weights.has_value();
    ctx->saved_data["layer"] = static_cast<int64_t>(comm::current_label().layer);
    return {rows, row_weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool has_weights = ctx->saved_data["has_weights"].toBool();
    const Plan plan = saved_plan(ctx);  // may run a checkpointed forward again: before the label
    const auto layer = static_cast<int32_t>(ctx->saved_data["layer"].toInt());
    const comm::ScopedLabel label({layer, "dispatch backward"});
    auto [grad_x, grad_weights] = call_combine(
        grads[0], has_weights ? std::optional<at::Tensor>(grads[1]) : std::nullopt, plan);
    return {grad_x, has_weights ? grad_weights : at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

Moved dispatch_autograd(const at::Tensor& x,
                        const std::optional<at::Tensor>& weights,
                        const at::Tensor& slot_of_copy,
                        const at::Tensor& slot_of_received,
                        const at::Tensor& expert_offsets,
                        const at::Tensor& counts,
                        const at::Tensor& host_counts,
                        int64_t top_k,
                        int64_t row_alignment,
                        const std::string& group_name,
                        const std::optional<at::Tensor>& send_rows,
                        const std::optional<at::Tensor>& send_weights) {
  const Plan plan = {slot_of_copy,
                     slot_of_received,
                     expert_offsets,
                     counts,
                     host_counts,
                     top_k,
                     row_alignment,
                     group_name};
  auto outputs = Dispatch::apply(x, weights, plan, SendBuffer{send_rows, send_weights});
  return {outputs[0], outputs[1]};
}

// Rows travel in the dtype in which the experts compute: half the bytes, the same values.
template <c10::DispatchKey kKey, c10::DeviceType kDevice>
Moved dispatch_autocast(const at::Tensor& x,
                        const std::optional<at::Tensor>& weights,
                        const at::Tensor& slot_of_copy,
                        const at::Tensor& slot_of_received,
                        const at::Tensor& expert_offsets,
                        const at::Tensor& counts,
                        const at::Tensor& host_counts,
                        int64_t top_k,
                        int64_t row_alignment,
                        const std::string& group_name,
                        const std::optional<at::Tensor>& send_rows,
                        const std::optional<at::Tensor>& send_weights) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  const Plan plan = {slot_of_copy,
                     slot_of_received,
                     expert_offsets,
                     counts,
                     host_counts,
                     top_k,
                     row_alignment,
                     group_name};
  return call_dispatch(
      at::autocast::cached_cast(dtype, x, kDevice), weights, plan, {send_rows, send_weights});
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) { m.impl("dispatch", &dispatch_autograd); }

TORCH_LIBRARY_IMPL(torch_moe_ep, AutocastCPU, m) {
  m.impl("dispatch", &dispatch_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(torch_moe_ep, AutocastCUDA, m) {
  m.impl("dispatch", &dispatch_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace torch_moe_ep
