#pragma once

// Kernels of plan and dispatch. Raw pointers and a stream, nothing of torch: these headers are read
// by nvcc. Every pointer is device memory; every launcher returns the launch error.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace torch_moe_ep {

// One block scans all experts, a thread each.
constexpr int kMaxExperts = 512;
// A warp holds one token's slots, a lane each.
constexpr int kMaxTopK = 32;

// Where each copy goes when copies are ordered by expert, then by copy number.
struct CopyPlaces {
  const int64_t* expert_ids;  // [num_copies]
  int64_t num_copies;
  int num_experts;
  int row_alignment;         // each expert's segment is rounded up to this many rows
  int64_t first_slot;        // added to every slot
  int32_t* block_counts;     // scratch [num_place_blocks(num_copies), num_experts]
  int64_t* slot_of_copy;     // [num_copies]; -1 for an id outside [0, num_experts)
  int64_t* segment_offsets;  // [num_experts + 1], or null
  int64_t* counts;           // [num_experts]
  int32_t* invalid_flag;     // [1]; set to 1 when an id is outside [0, num_experts), else untouched
};

// Blocks that place_copies runs, which is the first dimension of its scratch.
int num_place_blocks(int64_t num_copies);

// Two launches, no host sync. Deterministic: only integers are counted atomically.
cudaError_t launch_place_copies(const CopyPlaces& places, cudaStream_t stream);

// Where each received row goes in this rank's expert-ordered buffer.
struct ReceivedPlaces {
  const int64_t* counts;  // [num_ranks, num_experts] copies that each source rank sends
  int num_ranks;
  int num_experts;
  int rank;  // this rank, which owns the experts [rank * L, (rank + 1) * L), L = experts / ranks
  int row_alignment;
  int64_t* slot_of_received;  // [received], rank-major, inside a rank ascending expert
  int64_t* expert_offsets;    // [L + 1]
};

cudaError_t launch_place_received(const ReceivedPlaces& places, cudaStream_t stream);

// The same for all chunks of a plan in chunks: each expert has a segment for each chunk, one behind
// the other.
struct ChunkReceivedPlaces {
  const int64_t* counts;  // [num_chunks, num_ranks, num_experts]
  int num_chunks;
  int num_ranks;
  int num_experts;
  int rank;
  int row_alignment;
  int64_t* slot_of_received;  // [received], chunk after chunk, in each as in ReceivedPlaces
  int64_t* segment_offsets;   // [L * num_chunks + 1]
};

cudaError_t launch_place_chunks(const ChunkReceivedPlaces& places, cudaStream_t stream);

// Writes rows[slot_of_copy[s * copies_per_source + k]] = source[s] for all k, and zeros into the
// padding rows at the end of each expert's segment.
struct PackedRows {
  const void* source;           // [num_sources, row_bytes]
  const float* weights;         // [num_sources * copies_per_source], or null
  void* rows;                   // [slots, row_bytes]
  float* row_weights;           // [slots], or null; padding rows get 0
  const int64_t* slot_of_copy;  // [num_sources * copies_per_source]; -1: nowhere
  int64_t num_sources;
  int copies_per_source;  // at most kMaxTopK
  int64_t row_bytes;
  // Padding; expert_offsets null: rows have none.
  const int64_t* expert_offsets;  // [num_local_experts * num_chunks + 1]
  const int64_t* counts;          // [num_ranks, num_experts], of the chunk
  int num_ranks;
  int num_experts;
  int first_expert;  // global id of the first local expert
  int num_local_experts;
  int row_alignment;
  int num_chunks;  // segments of each expert, of which number `chunk` is padded
  int chunk;
};

cudaError_t launch_pack_rows(const PackedRows& packed, cudaStream_t stream);

}  // namespace torch_moe_ep
