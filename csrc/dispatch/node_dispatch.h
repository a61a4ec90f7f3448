// node_plan and node_dispatch: dispatch in two hops, so that a token crosses to a node once however
// many of its experts live there.
//
// Letters as in dispatch/dispatch.h; the P ranks of the group are M nodes of G ranks, rank r is
// place r % G of node r / G. Hop 1 takes a token's row to the rank of its own rank's place on each
// node that has one of its experts; hop 2 takes from there a row for each copy to the expert's
// rank.
//
// node_plan(expert_ids [T, K] int64, ...) ->
//   row_of_copy [N]        row of the copy's token in the send buffer of hop 1 (node-major, tokens
//                          ascending), for the first copy of each (token, node); -1 for the others.
//   slot_of_forwarded [*]  A rows arrive in hop 1; [A K]: row of the copy in the send buffer of hop
//                          2, which is in expert order without padding; -1 for copies of other
//                          nodes.
//   slot_of_received [*]   slot of each row that hop 2 brought.
//   expert_offsets [L+1], counts [P, E]: as of plan.
//   host_counts [P, E + M] on the CPU: copies of each rank for each expert, and its tokens for each
//                          node.
// Rows inside an expert's segment: source rank ascending, then copy ascending, as without nodes;
// the slots of rows are those of the flat dispatch, bit for bit.
//
// node_dispatch(x [T, H], weights [T, K] fp32 or none, plan) -> rows [R, H], row_weights [R], as of
// dispatch. In hop 1 all K weights of a token go with its row.
//
// Collective over the group; node_plan exchanges counts (one host wait on CUDA) and 4 K bytes of
// expert ids for each row of hop 1, packed while the counts travel; node_dispatch waits for nothing
// (gloo: for the exchanges). Deterministic. Errors as of plan; also ranks_per_node that does not
// divide the group's ranks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "common/node_sizes.h"
#include "common/node_split.h"
#include "dispatch/pack_rows.h"
#include "movement/node_movement.h"

namespace torch_moe_ep {

using NodePlanTensors =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using PackRows = Packed (*)(const Source&, int64_t num_slots, const Padding*);

// The expert ids of the rows of hop 1 in its send order, with room for a row on every node; needs
// no counts, so that it is done while they travel. ids int32 [T, K], contiguous.
at::Tensor pack_ids(const at::Tensor& ids,
                    const at::Tensor& row_of_copy,
                    const NodeSplit& split,
                    PackRows pack_rows);
// Those of the rows that arrive in hop 1, int32 [A, K].
at::Tensor exchange_ids(const at::Tensor& packed_ids,
                        const NodeSizes& sizes,
                        const NodeSplit& split,
                        const std::string& group_name,
                        const std::optional<at::Tensor>& bytes_sent);

// Both hops of node_dispatch, on the device whose pack_rows is given.
NodeMoved dispatch_over_nodes(const at::Tensor& x,
                              const std::optional<at::Tensor>& weights,
                              const NodePlan& plan,
                              const std::optional<at::Tensor>& bytes_sent,
                              PackRows pack_rows);

// The operator of a device.
template <PackRows kPackRows>
NodeMoved node_dispatch(const at::Tensor& x,
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
  const c10::DeviceGuard guard(x.device());
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
  return dispatch_over_nodes(x, weights, plan, bytes_sent, kPackRows);
}

}  // namespace torch_moe_ep
