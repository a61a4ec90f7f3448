// peer_plan and peer_dispatch: each row straight into its slot on the rank that owns its expert.
//
// Letters, order and padding of rows: dispatch/dispatch.h.
//
// peer_plan(expert_ids [T, K] int64, ...) ->
//   slot_of_copy [N]      owner * 2^40 + slot (common/peer_slot.h); -1 for an id that no expert has
//                         and for a slot beyond the capacity.
//   expert_offsets [L+1]  first slot of each local expert, all multiples of row_alignment; at most
//                         the capacity.
//   counts [P, E]         copies that each rank sends to each expert.
//   host_counts [P, E]    the same on the CPU with capacity 0; else [0, E].
// All int64. slots_needed int64 [1] grows to the slots that the rank with most would have needed,
// where that is more than the capacity; every rank of the group sees the same number.
//
// peer_dispatch(x [T, H], weights [T, K] fp32 or none, plan, keep) ->
//   rows [R, H]           of x's dtype; padding rows at a segment's end are zeros. Without keep
//   they
//                         lie in the buffer that the group's next operation overwrites.
//   row_weights [R] fp32  0 for padding; [0] without weights.
// R is expert_offsets[L] with capacity 0, else the capacity, and rows from expert_offsets[L] on are
// not written and no result may depend on them.
//
// Collective over the group (comm/peer.h). With capacity 0 peer_plan waits once on the host for the
// counts, by a counter in mapped memory; with a capacity nothing waits, and all of it can be
// captured in a CUDA graph after a first run. Deterministic. Rows are those of plan and dispatch,
// bit for bit.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "comm/peer_kernels.h"
#include "common/checks.h"

namespace torch_moe_ep {

// num_counts: of a rank, for all chunks.
inline void check_peer_plan(int64_t num_counts,
                            int64_t row_alignment,
                            int64_t capacity,
                            const at::Tensor& needed) {
  TORCH_CHECK_VALUE(num_counts <= comm::kMaxGatheredNumbers,
                    "num_chunks times num_experts must be at most ",
                    comm::kMaxGatheredNumbers,
                    " with the peer transport, got ",
                    num_counts,
                    " (take fewer chunks)");
  TORCH_CHECK_VALUE(capacity >= 0 && capacity % row_alignment == 0,
                    "capacity must be a multiple of row_alignment ",
                    row_alignment,
                    ", or 0 for what the counts ask for, got ",
                    capacity);
  TORCH_CHECK_VALUE(needed.scalar_type() == at::kLong && needed.numel() == 1,
                    "slots_needed must be int64 [1], got ",
                    needed.scalar_type(),
                    " ",
                    needed.sizes());
}

inline void check_num_sms(int64_t num_sms) {
  TORCH_CHECK_VALUE(num_sms > 0, "num_sms (MoEConfig.peer_sms) must be positive, got ", num_sms);
}

}  // namespace torch_moe_ep
