// sinkhorn: exp(logits), scaled until every expert has the same share of the tokens.
//
// sinkhorn(logits [T, E], num_iterations) -> plan [T, E] fp32
//   plan[t, e] = d0[t] * exp(logits[t, e]) * d1[e], where, starting at d1 = 1, each iteration does
//     d0[t] = 1 / (T * sum over e of exp(logits[t, e]) * d1[e])
//     d1[e] = 1 / (E * sum over t of d0[t] * exp(logits[t, e]))
//   so that columns sum to 1 / E and rows, in the limit, to 1 / T: the Sinkhorn-Knopp iteration
//   (Sinkhorn and Knopp 1967), which Megatron-LM's router runs with a test on the host.
// Computed as row softmax of logits + log d1, which cannot overflow at any logits. fp32, sums over
// tokens in fp64. A NaN logit makes everything NaN. Not collective, no host sync, deterministic,
// not differentiable.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "common/checks.h"

namespace torch_moe_ep {

inline void check_sinkhorn(const at::Tensor& logits, int64_t num_iterations) {
  check_dim(logits, "logits", 2, "[tokens, experts]");
  check_element_type(logits, "logits");
  TORCH_CHECK_VALUE(logits.size(1) > 0, "logits must have at least one expert, got none");
  TORCH_CHECK_VALUE(num_iterations > 0, "num_iterations must be at least 1, got ", num_iterations);
}

}  // namespace torch_moe_ep
