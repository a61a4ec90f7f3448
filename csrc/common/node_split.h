#pragma once

#include <c10/util/Exception.h>

#include <cstdint>

namespace torch_moe_ep {

// A group's ranks as nodes of equally many: rank = node * ranks_per_node + local.
struct NodeSplit {
  int64_t num_nodes;
  int64_t ranks_per_node;
  int64_t node;   // of this rank
  int64_t local;  // this rank's place on its node

  int64_t num_ranks() const { return num_nodes * ranks_per_node; }
  int64_t rank() const { return rank_of(node, local); }
  int64_t rank_of(int64_t other_node, int64_t other_local) const {
    return other_node * ranks_per_node + other_local;
  }
};

inline NodeSplit split_ranks(int64_t num_ranks, int64_t rank, int64_t ranks_per_node) {
  TORCH_CHECK_VALUE(ranks_per_node > 0 && num_ranks % ranks_per_node == 0,
                    "ranks_per_node must divide the group's ",
                    num_ranks,
                    " ranks, got ",
                    ranks_per_node);
  return {num_ranks / ranks_per_node, ranks_per_node, rank / ranks_per_node, rank % ranks_per_node};
}

}  // namespace torch_moe_ep
