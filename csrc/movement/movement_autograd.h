// Autograd of the operators that move rows to their experts and back, of every transport: each is
// the backward of the other.
//
// A Movement (movement.h, node_movement.h, peer_movement.h) holds a plan and says how to
// dispatch and to combine by it, and how it is kept for backward:
//   (rows, weights) dispatch(x, weights), combine(rows, row_weights); save(ctx), saved(ctx)
#pragma once

#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "comm/collective.h"
#include "comm/label.h"
#include "common/call_operator.h"
#include "common/checks.h"
#include "common/unowned_rows.h"

namespace torch_moe_ep {

// What both directions keep for backward besides the movement.
inline void save_call(torch::autograd::AutogradContext* ctx, bool has_weights) {
  ctx->saved_data["has_weights"] = has_weights;
  ctx->saved_data["layer"] = static_cast<int64_t>(comm::current_label().layer);
}

template <class Movement>
struct SavedCall {
  Movement movement;  // may run a checkpointed forward again, so that the label comes behind it
  bool has_weights;
  comm::ScopedLabel label;

  SavedCall(torch::autograd::AutogradContext* ctx, const char* stage)
      : movement(Movement::saved(ctx)),
        has_weights(ctx->saved_data["has_weights"].toBool()),
        label({static_cast<int32_t>(ctx->saved_data["layer"].toInt()), stage}) {}

  MaybeTensor weights(const at::Tensor& grad) const {
    return has_weights ? MaybeTensor(grad) : std::nullopt;
  }
};

template <class Movement>
class DispatchFunction : public torch::autograd::Function<DispatchFunction<Movement>> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const at::Tensor& x,
                                                const MaybeTensor& weights,
                                                const Movement& movement) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [rows, row_weights] = movement.dispatch(x, weights);
    movement.save(ctx);
    save_call(ctx, weights.has_value());
    return {rows, row_weights};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const SavedCall<Movement> call(ctx, "dispatch backward");
    auto [grad_x, grad_weights] = call.movement.combine(grads[0], call.weights(grads[1]));
    return {grad_x, call.has_weights ? grad_weights : at::Tensor(), at::Tensor()};
  }
};

template <class Movement>
class CombineFunction : public torch::autograd::Function<CombineFunction<Movement>> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const at::Tensor& rows,
                                                const MaybeTensor& row_weights,
                                                const Movement& movement,
                                                const MaybeTensor& tokens_per_expert) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [x, weights] = movement.combine(rows, row_weights);
    movement.save(ctx);
    save_call(ctx, row_weights.has_value());
    // Not by save_for_backward: other micro-batches change the counter before this one's backward.
    ctx->saved_data["tokens_per_expert"] = tokens_per_expert;
    return {x, weights};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const SavedCall<Movement> call(ctx, "combine backward");
    // backward() inside an autocast region must not cast what forward did not.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    auto [grad_rows, grad_weights] = call.movement.dispatch(grads[0], call.weights(grads[1]));
    const auto& plan = call.movement.plan;
    // Here, so that neither evaluation nor the recomputation of activation checkpointing counts.
    const auto counter = ctx->saved_data["tokens_per_expert"].template toOptional<at::Tensor>();
    if (counter.has_value()) {
      const int64_t rank = plan.group_name.empty() ? 0 : comm::group_rank(plan.group_name);
      counter->add_(plan.counts.select(0, rank));
    }
    return {without_unowned(grad_rows, plan.expert_offsets),
            call.has_weights ? without_unowned(grad_weights, plan.expert_offsets) : at::Tensor(),
            at::Tensor(),
            at::Tensor()};
  }
};

// What the Autograd and the autocast kernels of an operator do with its arguments.

template <class Movement>
auto dispatch_with_autograd(const at::Tensor& x,
                            const MaybeTensor& weights,
                            const Movement& movement) {
  auto outputs = DispatchFunction<Movement>::apply(x, weights, movement);
  return std::tuple(outputs[0], outputs[1]);
}

// Rows travel in the dtype in which the experts compute: half the bytes, the same values.
template <class Movement, c10::DeviceType kDevice>
auto dispatch_with_autocast(const at::Tensor& x,
                            const MaybeTensor& weights,
                            const Movement& movement) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  return movement.dispatch(at::autocast::cached_cast(dtype, x, kDevice), weights);
}

template <class Movement>
auto combine_with_autograd(const at::Tensor& rows,
                           const MaybeTensor& row_weights,
                           const Movement& movement,
                           const MaybeTensor& tokens_per_expert) {
  check_counter(tokens_per_expert, movement.plan.counts);
  auto outputs = CombineFunction<Movement>::apply(rows, row_weights, movement, tokens_per_expert);
  return std::tuple(outputs[0], outputs[1]);
}

}  // namespace torch_moe_ep
