#include <ATen/Functions.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "comm/collective.h"
#include "comm/label.h"
#include "comm/nodes.h"
#include "common/segments.h"
#include "dispatch/dispatch.h"
#include "dispatch/node_dispatch.h"

namespace torch_moe_ep {
namespace {

// Copies in order of their group's id (a node, an expert), ascending inside a group.
struct Placed {
  at::Tensor slot_of_copy;        // [N]; -1 for an id that is no group's
  std::vector<int64_t> lengths;   // [groups] copies of each
  int64_t num_without_group = 0;  // copies whose id is no group's
};

Placed place(const at::Tensor& group_ids, int64_t num_groups) {
  Placed placed = {at::empty({group_ids.numel()}, group_ids.options()),
                   std::vector<int64_t>(num_groups, 0)};
  const int64_t* ids = group_ids.const_data_ptr<int64_t>();
  const auto has_group = [&](int64_t n) { return ids[n] >= 0 && ids[n] < num_groups; };
  for (int64_t n = 0; n < group_ids.numel(); ++n) {
    has_group(n) ? ++placed.lengths[ids[n]] : ++placed.num_without_group;
  }
  std::vector<int64_t> next_slot(num_groups, 0);
  for (int64_t g = 0; g + 1 < num_groups; ++g) next_slot[g + 1] = next_slot[g] + placed.lengths[g];
  int64_t* slot = placed.slot_of_copy.mutable_data_ptr<int64_t>();
  for (int64_t n = 0; n < group_ids.numel(); ++n) slot[n] = has_group(n) ? next_slot[ids[n]]++ : -1;
  return placed;
}

// The node of each copy that is its token's first for that node; -1 for the others.
// Example: 2 experts a node, a token's ids 3 0 2: nodes 1 0 -1.
at::Tensor nodes_of_first_copies(const at::Tensor& ids, int64_t experts_per_node) {
  at::Tensor nodes = at::empty({ids.numel()}, ids.options());
  const int64_t* id = ids.const_data_ptr<int64_t>();
  int64_t* node = nodes.mutable_data_ptr<int64_t>();
  for (int64_t n = 0; n < ids.numel(); ++n) {
    // An id out of range is some node's or none's here, and refused once all ranks have met.
    node[n] = id[n] < 0 ? -1 : id[n] / experts_per_node;
    for (int64_t other = n - n % ids.size(1); other < n; ++other) {
      if (id[other] >= 0 && id[other] / experts_per_node == node[n]) node[n] = -1;
    }
  }
  return nodes;
}

// Counted from the node's first expert; -1 for those of other nodes. ids int32 [A, K].
at::Tensor ids_on_node(const at::Tensor& ids, int64_t first_expert, int64_t experts_per_node) {
  at::Tensor local = at::empty({ids.numel()}, ids.options().dtype(at::kLong));
  const int32_t* id = ids.const_data_ptr<int32_t>();
  int64_t* to = local.mutable_data_ptr<int64_t>();
  for (int64_t n = 0; n < ids.numel(); ++n) {
    const int64_t on_node = id[n] - first_expert;
    to[n] = on_node >= 0 && on_node < experts_per_node ? on_node : -1;
  }
  return local;
}

// This rank's numbers for the others: copies for each expert, tokens for each node, invalid ids.
at::Tensor own_counts(const Placed& copies, const Placed& tokens) {
  std::vector<int64_t> row = copies.lengths;
  row.insert(row.end(), tokens.lengths.begin(), tokens.lengths.end());
  row.push_back(copies.num_without_group);
  return at::tensor(row, at::TensorOptions().dtype(at::kLong));
}

void check_ids(const at::Tensor& gathered, int64_t num_experts) {
  const auto rows = gathered.accessor<int64_t, 2>();
  for (int64_t rank = 0; rank < gathered.size(0); ++rank) {
    const int64_t num_invalid = rows[rank][gathered.size(1) - 1];
    TORCH_CHECK_VALUE(num_invalid == 0,
                      "expert_ids must be in [0, ",
                      num_experts,
                      "), got ",
                      num_invalid,
                      " others on rank ",
                      rank,
                      " of the expert-parallel group (check the router)");
  }
}

// First slot of each local expert's segment, and the end. counts [P, E].
at::Tensor segment_offsets(const at::Tensor& counts, const NodeSplit& split, int64_t alignment) {
  const int64_t num_local = counts.size(1) / split.num_ranks();
  const auto count = counts.accessor<int64_t, 2>();
  at::Tensor offsets = at::zeros({num_local + 1}, counts.options());
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  for (int64_t l = 0; l < num_local; ++l) {
    int64_t length = 0;
    for (int64_t source = 0; source < counts.size(0); ++source) {
      length += count[source][split.rank() * num_local + l];
    }
    offset[l + 1] = offset[l] + round_up(length, alignment);
  }
  return offsets;
}

// Rows arrive by the place of the rank that sent them on, then by expert, then by source node;
// segments are expert-major and inside by source rank, which is by node, then place.
// Example: 2 nodes of 2 ranks, one local expert, one copy of every rank (rank 0 to 3): rows of rank
// 0 and 2 come through place 0, those of 1 and 3 through place 1: slots 0 2 1 3.
at::Tensor place_received(const at::Tensor& counts,
                          const at::Tensor& expert_offsets,
                          const NodeSplit& split,
                          int64_t num_received) {
  const int64_t num_local = expert_offsets.numel() - 1;
  const auto count = counts.accessor<int64_t, 2>();
  const int64_t* offset = expert_offsets.const_data_ptr<int64_t>();
  at::Tensor slot_of_received = at::empty({num_received}, counts.options());
  int64_t* slot = slot_of_received.mutable_data_ptr<int64_t>();
  for (int64_t via = 0; via < split.ranks_per_node; ++via) {
    for (int64_t l = 0; l < num_local; ++l) {
      int64_t next_slot = offset[l];
      for (int64_t source = 0; source < counts.size(0); ++source) {
        const int64_t length = count[source][split.rank() * num_local + l];
        if (source % split.ranks_per_node == via) {
          for (int64_t i = 0; i < length; ++i) *slot++ = next_slot + i;
        }
        next_slot += length;
      }
    }
  }
  return slot_of_received;
}

NodePlanTensors node_plan_cpu(const at::Tensor& expert_ids,
                              int64_t num_experts,
                              int64_t row_alignment,
                              int64_t max_rows,
                              int64_t ranks_per_node,
                              const std::string& group_name,
                              const at::Tensor& invalid_flag,
                              const std::optional<at::Tensor>& bytes_sent) {
  check_plan(expert_ids, num_experts, row_alignment, invalid_flag);
  const comm::ScopedStage stage("plan");
  const NodeSplit split = comm::node_split(group_name, ranks_per_node);
  check_experts_over_ranks(num_experts, split.num_ranks());
  const int64_t experts_per_node = num_experts / split.num_nodes;
  const at::Tensor ids = expert_ids.contiguous();
  const Placed copies = place(ids, num_experts);
  const Placed tokens = place(nodes_of_first_copies(ids, experts_per_node), split.num_nodes);
  comm::CountExchange exchange(own_counts(copies, tokens), group_name);
  const at::Tensor packed_ids =
      pack_ids(ids.to(at::kInt), tokens.slot_of_copy, split, &pack_rows_cpu);
  const at::Tensor gathered = exchange.wait().counts;
  check_ids(gathered, num_experts);
  const at::Tensor host_counts = gathered.narrow(1, 0, num_experts + split.num_nodes).contiguous();
  const at::Tensor counts = gathered.narrow(1, 0, num_experts).contiguous();
  const NodeSizes sizes = node_sizes(host_counts, split, row_alignment);
  check_max_rows(sizes.largest_num_slots, max_rows);
  const at::Tensor arrived_ids = exchange_ids(packed_ids, sizes, split, group_name, bytes_sent);
  const Placed forwarded = place(
      ids_on_node(arrived_ids, split.node * experts_per_node, experts_per_node), experts_per_node);
  const at::Tensor expert_offsets = segment_offsets(counts, split, row_alignment);
  return {tokens.slot_of_copy,
          forwarded.slot_of_copy,
          place_received(counts, expert_offsets, split, sizes.num_received),
          expert_offsets,
          counts,
          host_counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CPU, m) {
  m.impl("node_plan", &node_plan_cpu);
  m.impl("node_dispatch", &node_dispatch<&pack_rows_cpu>);
}

}  // namespace torch_moe_ep
