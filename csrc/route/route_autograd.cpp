#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "common/call_operator.h"
#include "route/route.h"

namespace torch_moe_ep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Routing = std::tuple<at::Tensor, at::Tensor>;  // weights, expert ids

class Route : public torch::autograd::Function<Route> {
 public:
  static variable_list forward(AutogradContext* ctx,
                               const at::Tensor& logits,
                               int64_t top_k,
                               bool normalize) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [weights, expert_ids] = call_operator<"route", Routing>(logits, top_k, normalize);
    ctx->save_for_backward({logits, weights, expert_ids});
    ctx->saved_data["normalize"] = normalize;
    ctx->mark_non_differentiable({expert_ids});
    return {weights, expert_ids};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor grad_logits = call_operator<"route_backward", at::Tensor>(
        grads[0], saved[0], saved[1], saved[2], ctx->saved_data["normalize"].toBool());
    return {grad_logits, at::Tensor(), at::Tensor()};
  }
};

Routing route_autograd(const at::Tensor& logits, int64_t top_k, bool normalize) {
  auto outputs = Route::apply(logits, top_k, normalize);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) {
  m.impl("route", &route_autograd);
  m.impl("route_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace torch_moe_ep
