// plan_chunks: where each copy goes when a rank's tokens travel in C chunks (common/chunk_sizes.h).
//
// Letters as in dispatch/dispatch.h. The rows that a rank receives lie in one buffer of R slots,
// ordered expert, chunk, source rank, copy: each local expert has a segment for each chunk, padded
// to row_alignment.
//
// plan_chunks(expert_ids [T, K] int64, num_experts, num_chunks, ...) ->
//   slot_of_copy [N]       the copy's row in the send buffer [N, H], in which chunk c begins at row
//                          K * first_token_of(c), in expert order; -1 for an id that no expert has
//                          (CUDA).
//   counts [C, P, E]       copies of each chunk that each rank sends to each expert.
//   host_counts [C, P, E]  the same on the CPU.
//   send_rows, send_weights  with x and weights: the send buffer, packed while the counts travel.
//
// Collective over the group, of two ranks or more: one exchange of counts for all chunks, one host
// wait (CUDA). Errors as of plan, with max_rows for all chunks; also num_chunks below 1.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "common/exchange_sizes.h"

namespace torch_moe_ep {

using ChunkPlanTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline void check_num_chunks(int64_t num_chunks, const std::string& group_name) {
  TORCH_CHECK_VALUE(num_chunks >= 1, "num_chunks must be at least 1, got ", num_chunks);
  TORCH_CHECK_VALUE(!group_name.empty(),
                    "chunks travel between the ranks of a group, got no group_name (call plan)");
}

// What each rank received, [P, C * E] to [C, P, E].
inline at::Tensor counts_by_chunk(const at::Tensor& gathered, int64_t num_chunks) {
  return gathered.contiguous()
      .view({gathered.size(0), num_chunks, gathered.size(1) / num_chunks})
      .transpose(0, 1)
      .contiguous();
}

// Slots that the rank needs that needs most. host_counts [C, P, E].
int64_t largest_num_slots(const at::Tensor& host_counts, int64_t row_alignment);

// First slot of each segment (l, c) of a rank, l C + c being its number, and the end: [L * C + 1]
// on the CPU.
at::Tensor segment_offsets_of(const at::Tensor& host_counts, int64_t rank, int64_t row_alignment);

// Where the rows are that this rank received; made of the counts alone.
struct ChunkPlaces {
  at::Tensor segment_offsets;                // [L * C + 1]
  std::vector<at::Tensor> slot_of_received;  // of each chunk [received]: rank-major
};

// sizes: of each chunk.
ChunkPlaces place_chunks_cpu(const at::Tensor& counts,
                             const std::vector<ExchangeSizes>& sizes,
                             int64_t rank,
                             int64_t row_alignment);
// The same on the current stream.
ChunkPlaces place_chunks_cuda(const at::Tensor& counts,
                              const std::vector<ExchangeSizes>& sizes,
                              int64_t rank,
                              int64_t row_alignment);

}  // namespace torch_moe_ep
