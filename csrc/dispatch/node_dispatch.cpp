#include "dispatch/node_dispatch.h"

#include <algorithm>

#include "comm/nodes.h"
#include "common/bytes_sent.h"
#include "common/exchange_sizes.h"
#include "dispatch/dispatch.h"

namespace torch_moe_ep {

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
  check_dispatch(x, weights, plan.row_of_copy, plan.top_k);
  const NodeSplit split = comm::node_split(plan.group_name, plan.ranks_per_node);
  const NodeSizes sizes = node_sizes(plan.host_counts, split, plan.row_alignment);
  // Hop 1: a row for each (token, node), and the router weights of all its copies.
  const auto pack = [&](const at::Tensor& tensor) {
    const Source source = {tensor.contiguous(), at::Tensor(), plan.row_of_copy, plan.top_k};
    return pack_rows(source, sizes.num_sent, nullptr).rows;
  };
  const auto bytes_of = [&](const at::Tensor& tensor) {
    return comm::bytes_to_other_nodes(tensor, sizes.sent_to_node, split);
  };
  const at::Tensor rows_out = pack(x);
  const at::Tensor weights_out = weights ? pack(*weights) : at::Tensor();
  add_bytes_sent(bytes_sent, bytes_of(rows_out), weights ? bytes_of(weights_out) : 0);
  const auto arrived = comm::exchange_between_nodes({rows_out, weights_out},
                                                    sizes.sent_to_node,
                                                    sizes.received_from_node,
                                                    split,
                                                    plan.group_name);
  // Hop 2: a row for each copy.
  const Source tokens = {arrived[0], arrived[1], plan.slot_of_forwarded, plan.top_k};
  const Packed sent = pack_rows(tokens, sizes.num_forwarded, nullptr);
  const auto received =
      comm::exchange_inside_node({sent.rows, weights ? sent.row_weights : at::Tensor()},
                                 sizes.sent_to_local,
                                 sizes.received_from_local,
                                 split,
                                 plan.group_name);
  const Source copies = {received[0], received[1], plan.slot_of_received, 1};
  const Padding padding = {plan.expert_offsets, plan.counts, split.rank(), plan.row_alignment};
  const Packed packed = pack_rows(copies, sizes.num_slots, &padding);
  return {packed.rows, packed.row_weights};
}

}  // namespace torch_moe_ep
