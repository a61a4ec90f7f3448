#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/segments.h"

namespace torch_moe_ep {

// What the host knows of a rank's rows when tokens travel in chunks (chunks/segments.h).
struct ChunkSlots {
  std::vector<int64_t> offsets;   // [L * C + 1] of this rank's segments
  int64_t largest_num_slots = 0;  // R of the rank that has most
};

// host_counts int64 [C, P, E] on the CPU: copies of each chunk that each rank sends to each expert.
inline ChunkSlots chunk_slots(const at::Tensor& host_counts, int64_t rank, int64_t row_alignment) {
  const int64_t num_chunks = host_counts.size(0), num_ranks = host_counts.size(1);
  const int64_t num_local = host_counts.size(2) / num_ranks;
  const auto count = host_counts.accessor<int64_t, 3>();
  ChunkSlots slots;
  for (int64_t owner = 0; owner < num_ranks; ++owner) {
    std::vector<int64_t> offsets = {0};
    for (int64_t segment = 0; segment < num_local * num_chunks; ++segment) {
      const int64_t expert = owner * num_local + segment / num_chunks;
      int64_t length = 0;
      for (int64_t source = 0; source < num_ranks; ++source) {
        length += count[segment % num_chunks][source][expert];
      }
      offsets.push_back(offsets.back() + round_up(length, row_alignment));
    }
    slots.largest_num_slots = std::max(slots.largest_num_slots, offsets.back());
    if (owner == rank) slots.offsets = std::move(offsets);
  }
  return slots;
}

}  // namespace torch_moe_ep
