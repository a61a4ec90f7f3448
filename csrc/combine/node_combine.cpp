#include "combine/node_combine.h"

#include "combine/combine.h"
#include "comm/nodes.h"
#include "common/bytes_sent.h"
#include "common/exchange_sizes.h"
#include "common/node_sizes.h"

namespace torch_moe_ep {

NodeMoved combine_over_nodes(const at::Tensor& rows,
                             const std::optional<at::Tensor>& row_weights,
                             const NodePlan& plan,
                             const std::optional<at::Tensor>& bytes_sent,
                             GatherRows gather_rows) {
  const NodeSplit split = comm::node_split(plan.group_name, plan.ranks_per_node);
  const NodeSizes sizes = node_sizes(plan.host_counts, split, plan.row_alignment);
  check_combine(rows, row_weights, plan.row_of_copy, sizes.num_slots, plan.top_k);
  // Rows go back the way they came; where hop 2 began, those of one token are added up.
  const Gathered returned = gather_rows(rows, row_weights, plan.slot_of_received, 1);
  const auto on_node = comm::exchange_inside_node(
      {returned.out, row_weights ? returned.weights.reshape({-1}) : at::Tensor()},
      sizes.received_from_local,
      sizes.sent_to_local,
      split,
      plan.group_name);
  const Gathered sums =
      gather_rows(on_node[0], given(on_node[1]), plan.slot_of_forwarded, plan.top_k);
  const auto bytes_of = [&](const at::Tensor& tensor) {
    return comm::bytes_to_other_nodes(tensor, sizes.received_from_node, split);
  };
  add_bytes_sent(bytes_sent, bytes_of(sums.out), row_weights ? bytes_of(sums.weights) : 0);
  const auto home =
      comm::exchange_between_nodes({sums.out, row_weights ? sums.weights : at::Tensor()},
                                   sizes.received_from_node,
                                   sizes.sent_to_node,
                                   split,
                                   plan.group_name);
  const Gathered x = gather_rows(home[0], std::nullopt, plan.row_of_copy, plan.top_k);
  if (!row_weights) return {x.out, x.weights};
  // A node answers with K weights for a token, 0 for copies of other nodes: their sum is exact.
  return {x.out, gather_rows(home[1], std::nullopt, plan.row_of_copy, plan.top_k).out};
}

}  // namespace torch_moe_ep
