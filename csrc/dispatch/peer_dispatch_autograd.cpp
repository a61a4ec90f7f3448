#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "comm/label.h"
#include "common/peer_movement.h"

namespace torch_moe_ep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class PeerDispatch : public torch::autograd::Function<PeerDispatch> {
 public:
  static variable_list forward(AutogradContext* ctx,
                               const at::Tensor& x,
                               const std::optional<at::Tensor>& weights,
                               const PeerPlan& plan,
                               bool keep) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [rows, row_weights] = call_peer_dispatch(x, weights, plan, keep);
    save_peer_plan(ctx, plan);
    ctx->saved_data["has_weights"] = weights.has_value();
    ctx->saved_data["layer"] = static_cast<int64_t>(comm::current_label().layer);
    return {rows, row_weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool has_weights = ctx->saved_data["has_weights"].toBool();
    // May run a checkpointed forward again: before the label.
    const PeerPlan plan = saved_peer_plan(ctx);
    const auto layer = static_cast<int32_t>(ctx->saved_data["layer"].toInt());
    const comm::ScopedLabel label({layer, "dispatch backward"});
    auto [grad_x, grad_weights] = call_peer_combine(
        grads[0], has_weights ? std::optional<at::Tensor>(grads[1]) : std::nullopt, plan);
    return {grad_x, has_weights ? grad_weights : at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

PeerMoved peer_dispatch_autograd(const at::Tensor& x,
                                 const std::optional<at::Tensor>& weights,
                                 const at::Tensor& slot_of_copy,
                                 const at::Tensor& expert_offsets,
                                 const at::Tensor& counts,
                                 const at::Tensor& host_counts,
                                 int64_t top_k,
                                 int64_t row_alignment,
                                 int64_t capacity,
                                 int64_t num_sms,
                                 const std::string& group_name,
                                 bool keep) {
  const PeerPlan plan = {slot_of_copy,
                         expert_offsets,
                         counts,
                         host_counts,
                         top_k,
                         row_alignment,
                         capacity,
                         num_sms,
                         group_name};
  auto outputs = PeerDispatch::apply(x, weights, plan, keep);
  return {outputs[0], outputs[1]};
}

// Rows travel in the dtype in which the experts compute: half the bytes, the same values.
PeerMoved peer_dispatch_autocast(const at::Tensor& x,
                                 const std::optional<at::Tensor>& weights,
                                 const at::Tensor& slot_of_copy,
                                 const at::Tensor& expert_offsets,
                                 const at::Tensor& counts,
                                 const at::Tensor& host_counts,
                                 int64_t top_k,
                                 int64_t row_alignment,
                                 int64_t capacity,
                                 int64_t num_sms,
                                 const std::string& group_name,
                                 bool keep) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  const auto dtype = at::autocast::get_autocast_dtype(at::kCUDA);
  const PeerPlan plan = {slot_of_copy,
                         expert_offsets,
                         counts,
                         host_counts,
                         top_k,
                         row_alignment,
                         capacity,
                         num_sms,
                         group_name};
  return call_peer_dispatch(at::autocast::cached_cast(dtype, x, at::kCUDA), weights, plan, keep);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) { m.impl("peer_dispatch", &peer_dispatch_autograd); }

TORCH_LIBRARY_IMPL(torch_moe_ep, AutocastCUDA, m) {
  m.impl("peer_dispatch", &peer_dispatch_autocast);
}

}  // namespace torch_moe_ep
