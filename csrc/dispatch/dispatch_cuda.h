// What plan and node_plan have in common on CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace torch_moe_ep {

// Copies in order of their group's id (an expert, a node), ascending inside a group.
struct Places {
  at::Tensor slot_of_copy;     // [N]; -1 for an id that is no group's
  at::Tensor segment_offsets;  // [groups + 1] first slot of each group, multiples of row_alignment;
                               // undefined where nobody asks
  at::Tensor counts;           // [groups] copies of each
};

// On the current stream; invalid_flag is set where an id is no group's.
Places place_copies_cuda(const at::Tensor& group_ids,
                         int64_t num_groups,
                         int64_t row_alignment,
                         const at::Tensor& invalid_flag);

// The same into tensors that are there; slots count from first_slot.
void place_copies_into_cuda(const at::Tensor& group_ids,
                            int64_t first_slot,
                            int64_t row_alignment,
                            const at::Tensor& invalid_flag,
                            const Places& places);

// TORCH_MOE_EP_CHECK=1: raises on every rank of the group where any of them met an invalid id.
// Waits on the host.
void check_ids_at_once(const at::Tensor& invalid_flag, const std::string& group_name);

void check_plan_on_cuda(int64_t num_experts, int64_t row_alignment);
void check_top_k_on_cuda(int64_t top_k);

}  // namespace torch_moe_ep
