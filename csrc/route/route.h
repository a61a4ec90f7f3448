// route: softmax over all experts, then the top_k of it.
//
// route(logits [T, E], top_k, normalize) ->
//   weights [T, K] fp32   the K largest probabilities, descending; divided by their sum when
//                         normalize (Hugging Face's MixtralTopKRouter).
//   expert_ids [T, K]     int64; of equal probabilities the smaller id comes first.
// A NaN logit makes its token's weights NaN; its ids are valid and distinct. Arithmetic is fp32 for
// every dtype of logits. Not collective, no host sync, deterministic.
//
// With p = softmax(logits), g the gradient of the weights and sums over the chosen:
//   not normalised, w = p:      d logit_e = p_e * (g_e - sum g w), g_e = 0 for the others
//   normalised, w = p / sum p:  d logit_e = w_e * (g_e - sum g w), 0 for the others
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "common/checks.h"

namespace torch_moe_ep {

inline void check_route(const at::Tensor& logits, int64_t top_k) {
  check_dim(logits, "logits", 2, "[tokens, experts]");
  check_element_type(logits, "logits");
  TORCH_CHECK_VALUE(top_k > 0 && top_k <= logits.size(1),
                    "top_k must be from 1 to the number of experts ",
                    logits.size(1),
                    ", got ",
                    top_k);
}

inline void check_route_backward(const at::Tensor& grad_weights,
                                 const at::Tensor& logits,
                                 const at::Tensor& weights,
                                 const at::Tensor& expert_ids) {
  check_dim(expert_ids, "expert_ids", 2, "[tokens, experts per token]");
  check_int64(expert_ids, "expert_ids");
  check_route(logits, expert_ids.size(1));
  check_float32(grad_weights, "grad_weights");
  check_float32(weights, "weights");
  TORCH_CHECK_VALUE(expert_ids.size(0) == logits.size(0) && weights.sizes() == expert_ids.sizes() &&
                        grad_weights.sizes() == expert_ids.sizes(),
                    "grad_weights, weights and expert_ids must be [",
                    logits.size(0),
                    ", experts per token], got shapes ",
                    grad_weights.sizes(),
                    ", ",
                    weights.sizes(),
                    " and ",
                    expert_ids.sizes());
}

}  // namespace torch_moe_ep
