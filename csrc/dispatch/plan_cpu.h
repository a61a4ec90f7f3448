// What plan and plan_chunks have in common on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace torch_moe_ep {

// [E + 1] copies of each expert, and of ids that no expert has.
at::Tensor count_copies(const at::Tensor& expert_ids, int64_t num_experts);

// num_invalid [P]: every rank sees the invalid ids of any rank and raises alike.
void check_ids(const at::Tensor& num_invalid, int64_t num_experts);

// First slot of each expert's segment, and the end.
std::vector<int64_t> offsets_of(const int64_t* lengths, int64_t num_experts, int64_t alignment);

// Ascending copies get ascending slots of their expert's segment.
at::Tensor place_copies(const at::Tensor& expert_ids, std::vector<int64_t> next_slot);

// Slot of each received row, rows being rank-major; next_slot: the first of each local expert.
// counts [P, E].
at::Tensor place_received(const at::Tensor& counts, int64_t rank, std::vector<int64_t> next_slot);

// First slot of each local expert's segment, and the end. counts [P, E].
std::vector<int64_t> local_offsets(const at::Tensor& counts, int64_t rank, int64_t alignment);

}  // namespace torch_moe_ep
