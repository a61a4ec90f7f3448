#include "combine/node_combine.h"

#include <vector>

#include "combine/combine.h"
#include "comm/label.h"
#include "comm/nodes.h"
#include "common/bytes_sent.h"
#include "common/exchange_sizes.h"
#include "common/node_sizes.h"

namespace torch_moe_ep {
namespace {

struct Hops {
  const NodePlan& plan;
  NodeSplit split;
  NodeSizes sizes;
  GatherRows gather_rows;
};

// Hop 2 backwards: rows go back to where they came from, and those of one token are added up there.
Gathered sum_on_node(const Hops& hops,
                     const at::Tensor& rows,
                     const std::optional<at::Tensor>& row_weights) {
  std::vector<at::Tensor> on_node;
  {
    // Before the sums are allocated the copies are gone.
    const Gathered copies = hops.gather_rows(rows, row_weights, hops.plan.slot_of_received, 1);
    on_node = comm::exchange_inside_node(
        {copies.out, row_weights ? copies.weights.reshape({-1}) : at::Tensor()},
        hops.sizes.received_from_local,
        hops.sizes.sent_to_local,
        hops.split,
        hops.plan.group_name);
  }
  return hops.gather_rows(
      on_node[0], given(on_node[1]), hops.plan.slot_of_forwarded, hops.plan.top_k);
}

// Hop 1 backwards: [rows, weights or undefined], a row for each (token, node).
std::vector<at::Tensor> cross_home(const Hops& hops,
                                   const Gathered& sums,
                                   bool has_weights,
                                   const std::optional<at::Tensor>& bytes_sent) {
  const auto bytes_of = [&](const at::Tensor& tensor) {
    return comm::bytes_to_other_nodes(tensor, hops.sizes.received_from_node, hops.split);
  };
  add_bytes_sent(bytes_sent, bytes_of(sums.out), has_weights ? bytes_of(sums.weights) : 0);
  return comm::exchange_between_nodes({sums.out, has_weights ? sums.weights : at::Tensor()},
                                      hops.sizes.received_from_node,
                                      hops.sizes.sent_to_node,
                                      hops.split,
                                      hops.plan.group_name);
}

}  // namespace

NodeMoved combine_over_nodes(const at::Tensor& rows,
                             const std::optional<at::Tensor>& row_weights,
                             const NodePlan& plan,
                             const std::optional<at::Tensor>& bytes_sent,
                             GatherRows gather_rows) {
  const comm::ScopedStage stage("combine");
  const NodeSplit split = comm::node_split(plan.group_name, plan.ranks_per_node);
  const Hops hops = {
      plan, split, node_sizes(plan.host_counts, split, plan.row_alignment), gather_rows};
  check_combine(rows, row_weights, plan.row_of_copy, hops.sizes.num_slots, plan.top_k);
  const auto home =
      cross_home(hops, sum_on_node(hops, rows, row_weights), row_weights.has_value(), bytes_sent);
  const Gathered x = gather_rows(home[0], std::nullopt, plan.row_of_copy, plan.top_k);
  if (!row_weights) return {x.out, x.weights};
  // A node answers with K weights for a token, 0 for copies of other nodes: their sum is exact.
  return {x.out, gather_rows(home[1], std::nullopt, plan.row_of_copy, plan.top_k).out};
}

}  // namespace torch_moe_ep
