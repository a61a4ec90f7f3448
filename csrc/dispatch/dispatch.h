// plan and dispatch: where each copy goes, and moving it there.
//
// T tokens of this rank, K experts per token, N = T K copies (copy n = t K + k), E experts, P ranks
// of the EP group (1 and no collective when group_name is empty), L = E / P local experts, R slots.
//
// plan(expert_ids [T, K] int64, ...) ->
//   slot_of_copy [N]      P = 1: the copy's slot. P > 1: its row in the send buffer, which is in
//                         expert order without padding. -1 for an id that no expert has (CUDA).
//   slot_of_received [*]  P > 1: slot of each received row, rows being rank-major; P = 1: [0].
//   expert_offsets [L+1]  first slot of each local expert, all multiples of row_alignment.
//   counts [P, E]         copies that each rank sends to each expert.
//   host_counts [P, E]    the same on the CPU; [0, E] where the host need not know (P = 1).
//   send_rows [N, H], send_weights [N]  with x and weights and P > 1: the send buffer, packed while
//                         the counts travel, in the order of slot_of_copy; else [0, 0] and [0].
// The first five are int64. Inside an expert's segment: source rank ascending, then copy ascending.
//
// dispatch(x [T, H], weights [T, K] fp32 or none, plan, send_rows and send_weights or none) ->
//   rows [R, H]           of x's dtype; padding rows at a segment's end are zeros.
//   row_weights [R] fp32  0 for padding; [0] without weights.
// R is expert_offsets[L] for P > 1, and a bound of it (slot_bound) for P = 1: rows from
// expert_offsets[L] on are not written and no result may depend on them.
//
// P > 1: collective over the group; plan waits once on the host for the counts (CUDA), dispatch for
// nothing (gloo: for the exchange). Deterministic. An id outside [0, E) raises on every rank of the
// group on the CPU and, with TORCH_MOE_EP_CHECK=1, on CUDA; else CUDA raises invalid_flag and the
// copy contributes zero. More slots than max_rows on any rank raises on every rank of the group,
// before rows are allocated.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "common/checks.h"

namespace torch_moe_ep {

using PlanTensors =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline void check_plan(const at::Tensor& expert_ids,
                       int64_t num_experts,
                       int64_t row_alignment,
                       const at::Tensor& invalid_flag) {
  check_dim(expert_ids, "expert_ids", 2, "[tokens, experts per token]");
  check_int64(expert_ids, "expert_ids");
  TORCH_CHECK_VALUE(num_experts > 0, "num_experts must be positive, got ", num_experts);
  TORCH_CHECK_VALUE(row_alignment > 0, "row_alignment must be positive, got ", row_alignment);
  TORCH_CHECK_VALUE(expert_ids.size(1) > 0,
                    "expert_ids must name at least one expert per token, got shape ",
                    expert_ids.sizes());
  TORCH_CHECK_VALUE(invalid_flag.scalar_type() == at::kInt && invalid_flag.numel() == 1,
                    "invalid_flag must be int32 [1], got ",
                    invalid_flag.scalar_type(),
                    " ",
                    invalid_flag.sizes());
  check_same_device(invalid_flag, "invalid_flag", expert_ids, "expert_ids");
}

// A send buffer that was packed elsewhere than by the plan of these tokens is refused as far as
// its shape shows.
inline void check_packed(const at::Tensor& x,
                         bool has_weights,
                         const at::Tensor& slot_of_copy,
                         const at::Tensor& send_rows,
                         const std::optional<at::Tensor>& send_weights) {
  TORCH_CHECK_VALUE(send_rows.dim() == 2 && send_rows.size(0) == slot_of_copy.numel() &&
                        send_rows.size(1) == x.size(1) && send_rows.dtype() == x.dtype(),
                    "send_rows must be [",
                    slot_of_copy.numel(),
                    ", ",
                    x.size(1),
                    "] ",
                    x.scalar_type(),
                    " from the plan of this x, got ",
                    send_rows.sizes(),
                    " ",
                    send_rows.scalar_type());
  TORCH_CHECK_VALUE(!has_weights || (send_weights && send_weights->numel() == slot_of_copy.numel()),
                    "send_weights must come from the plan with send_rows when weights are given");
}

// A plan's expert_offsets on the CPU; [0] where the host has no counts.
at::Tensor plan_host_offsets(const at::Tensor& host_counts,
                             int64_t row_alignment,
                             const std::string& group_name);

inline void check_experts_over_ranks(int64_t num_experts, int64_t num_ranks) {
  TORCH_CHECK_VALUE(num_experts % num_ranks == 0,
                    "num_experts must be a multiple of the group's ",
                    num_ranks,
                    " ranks, got ",
                    num_experts);
}

// num_slots of the rank that has most, or the bound for P = 1.
inline void check_max_rows(int64_t num_slots, int64_t max_rows) {
  TORCH_CHECK_VALUE(max_rows <= 0 || num_slots <= max_rows,
                    "a rank needs ",
                    num_slots,
                    " rows, but max_rows (MoEConfig.max_received_rows) is ",
                    max_rows,
                    "; raise it, or take fewer tokens a batch");
}

inline void check_dispatch(const at::Tensor& x,
                           const std::optional<at::Tensor>& weights,
                           const at::Tensor& slot_of_copy,
                           int64_t top_k) {
  check_dim(x, "x", 2, "[tokens, hidden]");
  check_element_type(x, "x");
  check_same_device(x, "x", slot_of_copy, "the plan");
  TORCH_CHECK_VALUE(top_k > 0 && x.size(0) * top_k == slot_of_copy.numel(),
                    "x must have the ",
                    top_k > 0 ? slot_of_copy.numel() / top_k : 0,
                    " tokens of the plan, got shape ",
                    x.sizes());
  if (!weights.has_value()) return;
  check_float32(*weights, "weights");
  check_same_device(*weights, "weights", x, "x");
  TORCH_CHECK_VALUE(
      weights->dim() == 2 && weights->size(0) == x.size(0) && weights->size(1) == top_k,
      "weights must be [",
      x.size(0),
      ", ",
      top_k,
      "] as the plan, got shape ",
      weights->sizes());
}

}  // namespace torch_moe_ep
