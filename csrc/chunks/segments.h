// Where the rows of all chunks lie: in one buffer of R slots, ordered expert, chunk, source rank,
// token, so that nothing is copied between a chunk and the whole.
//
// Each (local expert l, chunk c) is a segment, padded to row_alignment with zeros: the slots
// [offsets[l * C + c], offsets[l * C + c + 1]). Expert l has the slots from offsets[l * C] to
// offsets[(l + 1) * C]; their order is that in which the weights' gradients sum, and with C = 1
// that of plan.
// Example: 2 experts, 2 chunks, alignment 1, expert 0 with 2 and 1 rows, expert 1 with 0 and 3:
// offsets 0 2 3 3 6; chunk 1 has the slots 2 and 3 to 5.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace torch_moe_ep {

struct ChunkSegments {
  int64_t num_chunks;       // C
  int64_t num_slots;        // R: offsets[L * C], or a bound of it
  at::Tensor offsets;       // int64 [L * C + 1] on the device, written by the time that the first
                            // chunk has come
  at::Tensor host_offsets;  // the same on the CPU, or [0] where the host does not know them
};

}  // namespace torch_moe_ep
