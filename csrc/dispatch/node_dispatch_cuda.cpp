#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/env.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "comm/collective.h"
#include "comm/label.h"
#include "comm/nodes.h"
#include "dispatch/dispatch.h"
#include "dispatch/dispatch_cuda.h"
#include "dispatch/node_dispatch.h"
#include "dispatch/node_kernels.h"

namespace torch_moe_ep {
namespace {

struct TokenNodes {
  at::Tensor nodes;  // [N] int64: see FirstCopies
  at::Tensor ids;    // [T, K] int32, as they travel
};

TokenNodes nodes_of_first_copies(const at::Tensor& expert_ids,
                                 int64_t num_experts,
                                 int64_t num_nodes) {
  TokenNodes found = {at::empty({expert_ids.numel()}, expert_ids.options()),
                      at::empty(expert_ids.sizes(), expert_ids.options().dtype(at::kInt))};
  FirstCopies params = {};
  params.expert_ids = expert_ids.const_data_ptr<int64_t>();
  params.num_copies = expert_ids.numel();
  params.top_k = static_cast<int>(expert_ids.size(1));
  params.num_experts = static_cast<int>(num_experts);
  params.experts_per_node = static_cast<int>(num_experts / num_nodes);
  params.nodes = found.nodes.mutable_data_ptr<int64_t>();
  params.ids = found.ids.mutable_data_ptr<int32_t>();
  C10_CUDA_CHECK(launch_first_copies(params, at::cuda::getCurrentCUDAStream()));
  return found;
}

// [A K] int64, counted from the node's first expert; -1 for experts of other nodes.
at::Tensor ids_on_node(const at::Tensor& arrived_ids, int64_t node, int64_t experts_per_node) {
  at::Tensor local = at::empty({arrived_ids.numel()}, arrived_ids.options().dtype(at::kLong));
  IdsOnNode params = {};
  params.expert_ids = arrived_ids.const_data_ptr<int32_t>();
  params.num_copies = arrived_ids.numel();
  params.first_expert = static_cast<int>(node * experts_per_node);
  params.experts_per_node = static_cast<int>(experts_per_node);
  params.ids = local.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(launch_ids_on_node(params, at::cuda::getCurrentCUDAStream()));
  return local;
}

struct ReceivedSlots {
  at::Tensor slot_of_received;
  at::Tensor expert_offsets;
};

ReceivedSlots place_received(const at::Tensor& counts,
                             const NodeSplit& split,
                             int64_t row_alignment,
                             int64_t num_received) {
  const int64_t num_local = counts.size(1) / counts.size(0);
  ReceivedSlots slots = {at::empty({num_received}, counts.options()),
                         at::empty({num_local + 1}, counts.options())};
  NodeReceivedPlaces params = {};
  params.counts = counts.const_data_ptr<int64_t>();
  params.num_ranks = static_cast<int>(counts.size(0));
  params.ranks_per_node = static_cast<int>(split.ranks_per_node);
  params.num_experts = static_cast<int>(counts.size(1));
  params.rank = static_cast<int>(split.rank());
  params.row_alignment = static_cast<int>(row_alignment);
  params.slot_of_received = slots.slot_of_received.mutable_data_ptr<int64_t>();
  params.expert_offsets = slots.expert_offsets.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(launch_node_place_received(params, at::cuda::getCurrentCUDAStream()));
  return slots;
}

// TORCH_MOE_EP_CHECK=1: raises on every rank where any of them met an invalid id. The flags came
// with the counts, in the last column: no wait of its own.
void check_ids_at_once(const at::Tensor& host_row, const at::Tensor& invalid_flag) {
  if (!c10::utils::check_env("TORCH_MOE_EP_CHECK").value_or(false)) return;
  const auto rows = host_row.accessor<int64_t, 2>();
  for (int64_t rank = 0; rank < host_row.size(0); ++rank) {
    if (rows[rank][host_row.size(1) - 1] == 0) continue;
    invalid_flag.zero_();
    TORCH_CHECK_VALUE(false,
                      "expert_ids must be in [0, num_experts), got others on rank ",
                      rank,
                      " of the expert-parallel group (check the router)");
  }
}

NodePlanTensors node_plan_cuda(const at::Tensor& expert_ids,
                               int64_t num_experts,
                               int64_t row_alignment,
                               int64_t max_rows,
                               int64_t ranks_per_node,
                               const std::string& group_name,
                               const at::Tensor& invalid_flag,
                               const std::optional<at::Tensor>& bytes_sent) {
  check_plan(expert_ids, num_experts, row_alignment, invalid_flag);
  check_plan_on_cuda(num_experts, row_alignment);
  check_top_k_on_cuda(expert_ids.size(1));
  const comm::ScopedStage stage("plan");
  const NodeSplit split = comm::node_split(group_name, ranks_per_node);
  check_experts_over_ranks(num_experts, split.num_ranks());
  const c10::cuda::CUDAGuard guard(expert_ids.device());
  const at::Tensor ids = expert_ids.contiguous();
  const int64_t experts_per_node = num_experts / split.num_nodes;
  // Later copies of a node and experts of other nodes are no invalid ids: their flag is nobody's.
  const at::Tensor ignored_flag = at::empty_like(invalid_flag);
  const Places copies = place_copies_cuda(ids, num_experts, 1, invalid_flag);
  const TokenNodes found = nodes_of_first_copies(ids, num_experts, split.num_nodes);
  const Places tokens = place_copies_cuda(found.nodes, split.num_nodes, 1, ignored_flag);
  const at::Tensor own_row =
      at::cat({copies.counts, tokens.counts, invalid_flag.reshape({1}).to(at::kLong)});
  comm::CountExchange exchange(own_row, group_name);
  const at::Tensor packed_ids = pack_ids(found.ids, tokens.slot_of_copy, split, &pack_rows_cuda);
  // The one host wait of a layer's forward.
  const auto [gathered, host_row] = exchange.wait();
  check_ids_at_once(host_row, invalid_flag);
  const at::Tensor host_counts = host_row.narrow(1, 0, num_experts + split.num_nodes).contiguous();
  const at::Tensor counts = gathered.narrow(1, 0, num_experts).contiguous();
  const NodeSizes sizes = node_sizes(host_counts, split, row_alignment);
  check_max_rows(sizes.largest_num_slots, max_rows);
  const at::Tensor arrived_ids = exchange_ids(packed_ids, sizes, split, group_name, bytes_sent);
  const at::Tensor local_ids = ids_on_node(arrived_ids, split.node, experts_per_node);
  const Places forwarded = place_copies_cuda(local_ids, experts_per_node, 1, ignored_flag);
  const ReceivedSlots slots = place_received(counts, split, row_alignment, sizes.num_received);
  return {tokens.slot_of_copy,
          forwarded.slot_of_copy,
          slots.slot_of_received,
          slots.expert_offsets,
          counts,
          host_counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) {
  m.impl("node_plan", &node_plan_cuda);
  m.impl("node_dispatch", &node_dispatch<&pack_rows_cuda>);
}

}  // namespace torch_moe_ep
