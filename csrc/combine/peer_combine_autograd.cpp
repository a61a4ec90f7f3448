#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "comm/collective.h"
#include "comm/label.h"
#include "common/checks.h"
#include "common/peer_movement.h"
#include "common/unowned_rows.h"

namespace torch_moe_ep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class PeerCombine : public torch::autograd::Function<PeerCombine> {
 public:
  static variable_list forward(AutogradContext* ctx,
                               const at::Tensor& rows,
                               const std::optional<at::Tensor>& row_weights,
                               const PeerPlan& plan,
                               const std::optional<at::Tensor>& tokens_per_expert) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [x, weights] = call_peer_combine(rows, row_weights, plan);
    save_peer_plan(ctx, plan);
    ctx->saved_data["has_weights"] = row_weights.has_value();
    ctx->saved_data["layer"] = static_cast<int64_t>(comm::current_label().layer);
    // Not by save_for_backward: other micro-batches change the counter before this one's backward.
    ctx->saved_data["tokens_per_expert"] = tokens_per_expert;
    return {x, weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool has_weights = ctx->saved_data["has_weights"].toBool();
    // May run a checkpointed forward again: before the label.
    const PeerPlan plan = saved_peer_plan(ctx);
    const auto layer = static_cast<int32_t>(ctx->saved_data["layer"].toInt());
    const comm::ScopedLabel label({layer, "combine backward"});
    // backward() inside an autocast region must not cast what forward did not.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    auto [grad_rows, grad_row_weights] =
        call_peer_dispatch(grads[0],
                           has_weights ? std::optional<at::Tensor>(grads[1]) : std::nullopt,
                           plan,
                           /*keep=*/true);
    // Counted here, so that neither evaluation nor recomputation is.
    const auto counter = ctx->saved_data["tokens_per_expert"].toOptional<at::Tensor>();
    if (counter.has_value()) {
      counter->add_(plan.counts.select(0, comm::group_rank(plan.group_name)));
    }
    return {without_unowned(grad_rows, plan.expert_offsets),
            has_weights ? without_unowned(grad_row_weights, plan.expert_offsets) : at::Tensor(),
            at::Tensor(),
            at::Tensor()};
  }
};

PeerMoved peer_combine_autograd(const at::Tensor& rows,
                                const std::optional<at::Tensor>& row_weights,
                                const at::Tensor& slot_of_copy,
                                const at::Tensor& expert_offsets,
                                const at::Tensor& counts,
                                const at::Tensor& host_counts,
                                int64_t top_k,
                                int64_t row_alignment,
                                int64_t capacity,
                                int64_t num_sms,
                                const std::string& group_name,
                                const std::optional<at::Tensor>& tokens_per_expert) {
  const PeerPlan plan = {slot_of_copy,
                         expert_offsets,
                         counts,
                         host_counts,
                         top_k,
                         row_alignment,
                         capacity,
                         num_sms,
                         group_name};
  check_counter(tokens_per_expert, counts);
  auto outputs = PeerCombine::apply(rows, row_weights, plan, tokens_per_expert);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) { m.impl("peer_combine", &peer_combine_autograd); }

}  // namespace torch_moe_ep
