// combine: results back to their tokens, summed over K.
//
// combine(rows [R, H], row_weights [R] fp32 or none, plan) ->
//   x [T, H]             x[t] = sum over k of rows[slot of copy t K + k], ascending k, in fp32,
//                        rounded once; with K = 1 the row's bits.
//   weights [T, K] fp32  the row weight of each copy; [0] without row weights.
// Copies without a slot (invalid ids on CUDA) add nothing. Letters and plan: dispatch/dispatch.h.
// combine is the backward of dispatch and dispatch that of combine. The backward of combine also
// adds this rank's copies per expert to tokens_per_expert (int64 [E]), so that evaluation and
// recomputation are not counted.
//
// P > 1: collective over the group, no host wait (gloo: for the exchange). Deterministic.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

#include "common/checks.h"

namespace torch_moe_ep {

// num_slots: rows that dispatch makes of the same plan.
inline void check_combine(const at::Tensor& rows,
                          const std::optional<at::Tensor>& row_weights,
                          const at::Tensor& slot_of_copy,
                          int64_t num_slots,
                          int64_t top_k) {
  check_dim(rows, "rows", 2, "[slots, hidden]");
  check_element_type(rows, "rows");
  check_same_device(rows, "rows", slot_of_copy, "the plan");
  TORCH_CHECK_VALUE(top_k > 0, "top_k must be positive, got ", top_k);
  TORCH_CHECK_VALUE(rows.size(0) == num_slots,
                    "rows must have the ",
                    num_slots,
                    " slots of the plan, got shape ",
                    rows.sizes());
  if (!row_weights.has_value()) return;
  check_float32(*row_weights, "row_weights");
  check_same_device(*row_weights, "row_weights", rows, "rows");
  TORCH_CHECK_VALUE(row_weights->dim() == 1 && row_weights->size(0) == num_slots,
                    "row_weights must be [",
                    num_slots,
                    "], got shape ",
                    row_weights->sizes());
}

}  // namespace torch_moe_ep
