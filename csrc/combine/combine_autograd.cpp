#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "comm/collective.h"
#include "comm/label.h"
#include "common/checks.h"
#include "common/movement.h"
#include "common/unowned_rows.h"

namespace torch_moe_ep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// This rank's copies per expert. In backward, so that neither evaluation nor the recomputation of
// activation checkpointing is counted.
void count_tokens(const at::Tensor& tokens_per_expert, const Plan& plan) {
  const int64_t rank = plan.group_name.empty() ? 0 : comm::group_rank(plan.group_name);
  tokens_per_expert.add_(plan.counts.select(0, rank));
}

class Combine : public torch::autograd::Function<Combine> {
 public:
  static variable_list forward(AutogradContext* ctx,
                               const at::Tensor& rows,
                               const std::optional<at::Tensor>& row_weights,
                               const Plan& plan,
                               const std::optional<at::Tensor>& tokens_per_expert) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [x, weights] = call_combine(rows, row_weights, plan);
    save_plan(ctx, plan);
    ctx->saved_data["has_weights"] = row_weights.has_value();
    ctx->saved_data["layer"] = static_cast<int64_t>(comm::current_label().layer);
    // Not by save_for_backward: other micro-batches change the counter before this one's backward.
    ctx->saved_data["tokens_per_expert"] = tokens_per_expert;
    return {x, weights};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool has_weights = ctx->saved_data["has_weights"].toBool();
    const Plan plan = saved_plan(ctx);  // may run a checkpointed forward again: before the label
    const auto layer = static_cast<int32_t>(ctx->saved_data["layer"].toInt());
    const comm::ScopedLabel label({layer, "combine backward"});
    // backward() inside an autocast region must not cast what forward did not.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    auto [grad_rows, grad_row_weights] = call_dispatch(
        grads[0], has_weights ? std::optional<at::Tensor>(grads[1]) : std::nullopt, plan);
    const auto counter = ctx->saved_data["tokens_per_expert"].toOptional<at::Tensor>();
    if (counter.has_value()) count_tokens(*counter, plan);
    return {without_unowned(grad_rows, plan.expert_offsets),
            has_weights ? without_unowned(grad_row_weights, plan.expert_offsets) : at::Tensor(),
            at::Tensor(),
            at::Tensor()};
  }
};

Moved combine_autograd(const at::Tensor& rows,
                       const std::optional<at::Tensor>& row_weights,
                       const at::Tensor& slot_of_copy,
                       const at::Tensor& slot_of_received,
                       const at::Tensor& expert_offsets,
                       const at::Tensor& counts,
                       const at::Tensor& host_counts,
                       int64_t top_k,
                       int64_t row_alignment,
                       const std::string& group_name,
                       const std::optional<at::Tensor>& tokens_per_expert) {
  const Plan plan = {slot_of_copy,
                     slot_of_received,
                     expert_offsets,
                     counts,
                     host_counts,
                     top_k,
                     row_alignment,
                     group_name};
  check_counter(tokens_per_expert, counts);
  auto outputs = Combine::apply(rows, row_weights, plan, tokens_per_expert);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) { m.impl("combine", &combine_autograd); }

}  // namespace torch_moe_ep
