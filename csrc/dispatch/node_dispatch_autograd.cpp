#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "comm/label.h"
#include "common/node_movement.h"

namespace torch_moe_ep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class NodeDispatch : public torch::autograd::Function<NodeDispatch> {
 public:
  static variable_list forward(AutogradContext* ctx,
                               const at::Tensor& x,
                               const std::optional<at::Tensor>& weights,
                               const NodePlan& plan,
                               const std::optional<at::Tensor>& bytes_sent) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [rows, row_weights] = call_node_dispatch(x, weights, plan, bytes_sent);
    save_node_plan(ctx, plan);
    ctx->saved_data["has_weights"] = weights.has_value();
    ctx->saved_data["layer"] = static_cast<int64_t>(comm::current_label().layer);
    // Not by save_for_backward: other layers' calls change the counter before this one's backward.
    ctx->saved_data["bytes_sent"] = bytes_sent;
    return {rows, row_weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool has_weights = ctx->saved_data["has_weights"].toBool();
    // May run a checkpointed forward again: before the label.
    const NodePlan plan = saved_node_plan(ctx);
    const auto layer = static_cast<int32_t>(ctx->saved_data["layer"].toInt());
    const comm::ScopedLabel label({layer, "dispatch backward"});
    auto [grad_x, grad_weights] =
        call_node_combine(grads[0],
                          has_weights ? std::optional<at::Tensor>(grads[1]) : std::nullopt,
                          plan,
                          ctx->saved_data["bytes_sent"].toOptional<at::Tensor>());
    return {grad_x, has_weights ? grad_weights : at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

NodeMoved node_dispatch_autograd(const at::Tensor& x,
                                 const std::optional<at::Tensor>& weights,
                                 const at::Tensor& row_of_copy,
                                 const at::Tensor& slot_of_forwarded,
                                 const at::Tensor& slot_of_received,
                                 const at::Tensor& expert_offsets,
                                 const at::Tensor& counts,
                                 const at::Tensor& host_counts,
                                 int64_t top_k,
                                 int64_t row_alignment,
                                 int64_t ranks_per_node,
                                 const std::string& group_name,
                                 const std::optional<at::Tensor>& bytes_sent) {
  const NodePlan plan = {row_of_copy,
                         slot_of_forwarded,
                         slot_of_received,
                         expert_offsets,
                         counts,
                         host_counts,
                         top_k,
                         row_alignment,
                         ranks_per_node,
                         group_name};
  auto outputs = NodeDispatch::apply(x, weights, plan, bytes_sent);
  return {outputs[0], outputs[1]};
}

// Rows travel in the dtype in which the experts compute: half the bytes, the same values.
template <c10::DispatchKey kKey, c10::DeviceType kDevice>
NodeMoved node_dispatch_autocast(const at::Tensor& x,
                                 const std::optional<at::Tensor>& weights,
                                 const at::Tensor& row_of_copy,
                                 const at::Tensor& slot_of_forwarded,
                                 const at::Tensor& slot_of_received,
                                 const at::Tensor& expert_offsets,
                                 const at::Tensor& counts,
                                 const at::Tensor& host_counts,
                                 int64_t top_k,
                                 int64_t row_alignment,
                                 int64_t ranks_per_node,
                                 const std::string& group_name,
                                 const std::optional<at::Tensor>& bytes_sent) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  const NodePlan plan = {row_of_copy,
                         slot_of_forwarded,
                         slot_of_received,
                         expert_offsets,
                         counts,
                         host_counts,
                         top_k,
                         row_alignment,
                         ranks_per_node,
                         group_name};
  return call_node_dispatch(
      at::autocast::cached_cast(dtype, x, kDevice), weights, plan, bytes_sent);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) { m.impl("node_dispatch", &node_dispatch_autograd); }

TORCH_LIBRARY_IMPL(torch_moe_ep, AutocastCPU, m) {
  m.impl("node_dispatch",
         &node_dispatch_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(torch_moe_ep, AutocastCUDA, m) {
  m.impl("node_dispatch",
         &node_dispatch_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace torch_moe_ep
