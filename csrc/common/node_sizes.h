#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <numeric>
#include <vector>

#include "common/exchange_sizes.h"
#include "common/node_split.h"

namespace torch_moe_ep {

// What one rank moves in the two hops of a dispatch over nodes, computed on the host. M nodes of G
// ranks. Hop 1: a token's row to the rank of the same place on each of its nodes. Hop 2: from there
// a row for each copy to the ranks of the node. combine takes the hops backwards.
struct NodeSizes {
  std::vector<int64_t> sent_to_node;         // [M] rows of hop 1
  std::vector<int64_t> received_from_node;   // [M]
  std::vector<int64_t> sent_to_local;        // [G] rows of hop 2
  std::vector<int64_t> received_from_local;  // [G]
  int64_t num_sent = 0;                      // sums of the four
  int64_t num_arrived = 0;
  int64_t num_forwarded = 0;
  int64_t num_received = 0;
  int64_t num_slots = 0;          // R of this rank
  int64_t largest_num_slots = 0;  // R of the rank that has most
};

// host_counts int64 [P, E + M] on the CPU: what each rank has for each expert (copies) and for each
// node (tokens). Example: 2 nodes of 1 rank, one expert a rank, rank 0 has the tokens {0, 1} and
// {1}, rank 1 has {0}: [[1, 2, 1, 2], [1, 0, 1, 0]].
inline NodeSizes node_sizes(const at::Tensor& host_counts,
                            const NodeSplit& split,
                            int64_t row_alignment) {
  const int64_t num_experts = host_counts.size(1) - split.num_nodes;
  const auto counts = host_counts.accessor<int64_t, 2>();
  const int64_t num_local = num_experts / split.num_ranks();
  // Copies that the ranks of place `via` on their nodes have for the experts of `owner`.
  const auto copies = [&](int64_t via, int64_t owner) {
    int64_t sum = 0;
    for (int64_t node = 0; node < split.num_nodes; ++node) {
      const auto of_rank = counts[split.rank_of(node, via)];
      for (int64_t l = 0; l < num_local; ++l) sum += of_rank[owner * num_local + l];
    }
    return sum;
  };
  NodeSizes sizes;
  for (int64_t node = 0; node < split.num_nodes; ++node) {
    sizes.sent_to_node.push_back(counts[split.rank()][num_experts + node]);
    sizes.received_from_node.push_back(
        counts[split.rank_of(node, split.local)][num_experts + split.node]);
  }
  for (int64_t local = 0; local < split.ranks_per_node; ++local) {
    sizes.sent_to_local.push_back(copies(split.local, split.rank_of(split.node, local)));
    sizes.received_from_local.push_back(copies(local, split.rank()));
  }
  const auto sum = [](const std::vector<int64_t>& rows) {
    return std::accumulate(rows.begin(), rows.end(), int64_t{0});
  };
  sizes.num_sent = sum(sizes.sent_to_node);
  sizes.num_arrived = sum(sizes.received_from_node);
  sizes.num_forwarded = sum(sizes.sent_to_local);
  sizes.num_received = sum(sizes.received_from_local);
  const ExchangeSizes flat = exchange_sizes(
      host_counts.narrow(1, 0, num_experts).contiguous(), split.rank(), row_alignment);
  sizes.num_slots = flat.num_slots;
  sizes.largest_num_slots = flat.largest_num_slots;
  return sizes;
}

}  // namespace torch_moe_ep
