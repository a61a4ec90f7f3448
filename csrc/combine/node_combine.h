// node_combine: results back in two hops, summed on each node before they cross.
//
// node_combine(rows [R, H], row_weights [R] fp32 or none, plan) ->
//   x [T, H]             every node's sum over its copies of a token, ascending k, in fp32, rounded
//                        once to the rows' dtype for the way; the sum of these over the token's
//                        nodes, in the order of their first copies, in fp32, rounded once.
//   weights [T, K] fp32  the row weight of each copy, exactly; [0] without row weights.
// Copies without a slot (invalid ids on CUDA) add nothing. Letters and plan:
// dispatch/node_dispatch.h. node_combine is the backward of node_dispatch and node_dispatch that of
// node_combine, whose backward also adds this rank's copies per expert to tokens_per_expert (int64
// [E]).
//
// Collective over the group, no host wait (gloo: for the exchanges). Deterministic.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <cstdint>
#include <optional>
#include <string>

#include "combine/gather_rows.h"
#include "movement/node_movement.h"

namespace torch_moe_ep {

using GatherRows = Gathered (*)(const at::Tensor& rows,
                                const std::optional<at::Tensor>& row_weights,
                                const at::Tensor& slot_of_copy,
                                int64_t copies_per_output);

// Both hops, on the device whose gather_rows is given.
NodeMoved combine_over_nodes(const at::Tensor& rows,
                             const std::optional<at::Tensor>& row_weights,
                             const NodePlan& plan,
                             const std::optional<at::Tensor>& bytes_sent,
                             GatherRows gather_rows);

// The operator of a device.
template <GatherRows kGatherRows>
NodeMoved node_combine(const at::Tensor& rows,
                       const std::optional<at::Tensor>& row_weights,
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
                       const std::optional<at::Tensor>& /*tokens_per_expert*/,
                       const std::optional<at::Tensor>& bytes_sent) {
  const c10::DeviceGuard guard(rows.device());
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
  return combine_over_nodes(rows, row_weights, plan, bytes_sent, kGatherRows);
}

}  // namespace torch_moe_ep
