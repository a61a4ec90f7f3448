#include "dispatch/node_dispatch.h"

#include <algorithm>
#include <utility>

#include "comm/label.h"
#include "comm/nodes.h"
#include "common/bytes_sent.h"
#include "dispatch/dispatch.h"

namespace torch_moe_ep {
namespace {

struct Hops {
  const NodePlan& plan;
  NodeSplit split;
  NodeSizes sizes;
  PackRows pack_rows;
};

struct Travelling {
  at::Tensor rows;
  at::Tensor weights;  // undefined where none travel
};

// Hop 1: a row for each (token, node) [A, H], and the router weights of all its copies [A, K].
Travelling cross_nodes(const Hops& hops,
                       const at::Tensor& x,
                       const std::optional<at::Tensor>& weights,
                       const std::optional<at::Tensor>& bytes_sent) {
  const auto pack = [&](const at::Tensor& tensor) {
    const Source source = {
        tensor.contiguous(), at::Tensor(), hops.plan.row_of_copy, hops.plan.top_k};
    return hops.pack_rows(source, hops.sizes.num_sent, nullptr).rows;
  };
  const auto bytes_of = [&](const at::Tensor& tensor) {
    return comm::bytes_to_other_nodes(tensor, hops.sizes.sent_to_node, hops.split);
  };
  const at::Tensor rows_out = pack(x);
  const at::Tensor weights_out = weights ? pack(*weights) : at::Tensor();
  add_bytes_sent(bytes_sent, bytes_of(rows_out), weights ? bytes_of(weights_out) : 0);
  const auto arrived = comm::exchange_between_nodes({rows_out, weights_out},
                                                    hops.sizes.sent_to_node,
                                                    hops.sizes.received_from_node,
                                                    hops.split,
                                                    hops.plan.group_name);
  return {arrived[0], arrived[1]};
}

// Hop 2: a row for each copy, and its weight. By value, so that no more than two buffers live.
Travelling fan_out(const Hops& hops, Travelling arrived) {
  const bool has_weights = arrived.weights.defined();
  Packed sent = hops.pack_rows({std::move(arrived.rows),
                                std::move(arrived.weights),
                                hops.plan.slot_of_forwarded,
                                hops.plan.top_k},
                               hops.sizes.num_forwarded,
                               nullptr);
  const auto received =
      comm::exchange_inside_node({sent.rows, has_weights ? sent.row_weights : at::Tensor()},
                                 hops.sizes.sent_to_local,
                                 hops.sizes.received_from_local,
                                 hops.split,
                                 hops.plan.group_name);
  return {received[0], received[1]};
}

}  // namespace

at::Tensor pack_ids(const at::Tensor& ids,
                    const at::Tensor& row_of_copy,
                    const NodeSplit& split,
                    PackRows pack_rows) {
  const int64_t most_nodes = std::min(ids.size(1), split.num_nodes);
  return pack_rows({ids, at::Tensor(), row_of_copy, ids.size(1)}, ids.size(0) * most_nodes, nullptr)
      .rows;
}

at::Tensor exchange_ids(const at::Tensor& packed_ids,
                        const NodeSizes& sizes,
                        const NodeSplit& split,
                        const std::string& group_name,
                        const std::optional<at::Tensor>& bytes_sent) {
  const at::Tensor sent = packed_ids.narrow(0, 0, sizes.num_sent);
  add_bytes_sent(bytes_sent, 0, comm::bytes_to_other_nodes(sent, sizes.sent_to_node, split));
  return comm::exchange_between_nodes(
      {sent}, sizes.sent_to_node, sizes.received_from_node, split, group_name)[0];
}

NodeMoved dispatch_over_nodes(const at::Tensor& x,
                              const std::optional<at::Tensor>& weights,
                              const NodePlan& plan,
                              const std::optional<at::Tensor>& bytes_sent,
                              PackRows pack_rows) {
  const comm::ScopedStage stage("dispatch");
  check_dispatch(x, weights, plan.row_of_copy, plan.top_k);
  const NodeSplit split = comm::node_split(plan.group_name, plan.ranks_per_node);
  const Hops hops = {
      plan, split, node_sizes(plan.host_counts, split, plan.row_alignment), pack_rows};
  const Travelling received = fan_out(hops, cross_nodes(hops, x, weights, bytes_sent));
  const Source copies = {received.rows, received.weights, plan.slot_of_received, 1};
  const Padding padding = {plan.expert_offsets, plan.counts, split.rank(), plan.row_alignment};
  const Packed packed = pack_rows(copies, hops.sizes.num_slots, &padding);
  return {packed.rows, packed.row_weights};
}

}  // namespace torch_moe_ep
