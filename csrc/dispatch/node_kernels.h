#pragma once

// Kernels of node_plan. Raw pointers and a stream, nothing of torch. Every pointer is device
// memory; every launcher returns the launch error.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace torch_moe_ep {

// The node of each copy that is its token's first for that node.
// Example: 2 experts a node, a token's ids 3 0 2: nodes 1 0 -1.
struct FirstCopies {
  const int64_t* expert_ids;  // [num_copies]
  int64_t num_copies;
  int top_k;
  int num_experts;
  int experts_per_node;
  int64_t* nodes;  // [num_copies]; -1 for later copies and for ids outside [0, num_experts)
  int32_t* ids;    // [num_copies] the ids as they travel; -1 outside [0, num_experts)
};

cudaError_t launch_first_copies(const FirstCopies& copies, cudaStream_t stream);

// Ids counted from the node's first expert.
struct IdsOnNode {
  const int32_t* expert_ids;  // [num_copies]
  int64_t num_copies;
  int first_expert;
  int experts_per_node;
  int64_t* ids;  // [num_copies]; -1 for experts of other nodes
};

cudaError_t launch_ids_on_node(const IdsOnNode& ids, cudaStream_t stream);

// Slots of the rows of hop 2, which arrive by the place of the rank that sent them on, then by
// expert, then by source node. Segments are expert-major and inside by source rank.
// Example: 2 nodes of 2 ranks, one local expert, one copy of every rank (rank 0 to 3): rows of rank
// 0 and 2 come through place 0, those of 1 and 3 through place 1: slots 0 2 1 3.
struct NodeReceivedPlaces {
  const int64_t* counts;  // [num_ranks, num_experts] copies that each rank sends to each expert
  int num_ranks;
  int ranks_per_node;
  int num_experts;  // at most kMaxExperts of dispatch_kernels.h
  int rank;
  int row_alignment;
  int64_t* slot_of_received;  // [received]
  int64_t* expert_offsets;    // [L + 1]
};

cudaError_t launch_node_place_received(const NodeReceivedPlaces& places, cudaStream_t stream);

}  // namespace torch_moe_ep
