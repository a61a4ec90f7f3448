#pragma once

#include <cstdint>

namespace torch_moe_ep {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Rows that hold any routing of num_copies on one rank, known without looking at the ids: each
// expert's segment may end in row_alignment - 1 padding rows. Exact for row_alignment 1.
inline int64_t slot_bound(int64_t num_copies, int64_t num_experts, int64_t row_alignment) {
  return (num_copies + num_experts * (row_alignment - 1)) / row_alignment * row_alignment;
}

}  // namespace torch_moe_ep
