// Rows to the slots of their copies: what plan and dispatch do to memory, on either device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace torch_moe_ep {

struct Packed {
  at::Tensor rows;         // [num_slots, H]
  at::Tensor row_weights;  // [num_slots] fp32, or [0] without weights
};

// Rows to copy, contiguous, and with them the weights of copies where there are any.
struct Source {
  at::Tensor rows;     // [num_sources, H]
  at::Tensor weights;  // [num_sources * copies_per_source] fp32, or undefined
  at::Tensor slot_of_copy;
  int64_t copies_per_source;
};

// Where zeros are written behind each expert's copies, up to the next segment.
struct Padding {
  at::Tensor expert_offsets;  // [L + 1], or [L * num_chunks + 1] with a segment for each chunk
  at::Tensor counts;          // [P, E], of the chunk
  int64_t rank;
  int64_t row_alignment;
  int64_t num_chunks = 1;
  int64_t chunk = 0;
};

// rows[slot_of_copy[s * copies_per_source + k]] = source.rows[s], and likewise the weights; a slot
// of -1 is nowhere. Without padding every row has a copy. Rows are moved as bytes, in any dtype.
Packed pack_rows_cpu(const Source& source, int64_t num_slots, const Padding* padding);
// The same on the current stream.
Packed pack_rows_cuda(const Source& source, int64_t num_slots, const Padding* padding);

// The same into rows that are there, contiguous, and row weights where the source has weights;
// slots that get nothing stay as they are.
void pack_rows_into_cpu(const Source& source, const Packed& into, const Padding* padding);
void pack_rows_into_cuda(const Source& source, const Packed& into, const Padding* padding);

}  // namespace torch_moe_ep
