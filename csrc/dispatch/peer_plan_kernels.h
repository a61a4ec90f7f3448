#pragma once

// Kernels of peer_plan and peer_plan_chunks. Raw pointers and a stream, nothing of torch. Every
// pointer is device memory of this rank; every launcher returns the launch error.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace torch_moe_ep {

// Where the segments of every owner lie, ordered local expert, then chunk, and in them this rank's
// copies. With one chunk a segment is an expert's. A block an owner.
struct PeerSegments {
  const int64_t* counts;  // [num_chunks, num_ranks, num_experts]
  int num_chunks;
  int num_ranks;
  int num_experts;
  int rank;
  int row_alignment;
  int64_t capacity;          // of every rank's rows; 0: none
  int64_t* first_slots;      // [num_chunks, num_experts] slot of this rank's first copy in each
  int64_t* segment_offsets;  // [num_experts / num_ranks * num_chunks + 1] of this rank
  int64_t* slots_needed;     // [1]; grows to the most slots of any rank where that exceeds capacity
};

cudaError_t launch_place_segments(const PeerSegments& segments, cudaStream_t stream);

// From a copy's place among its chunk's copies, in expert order, to its slot on the owner.
struct PeerCopyPlaces {
  const int64_t* expert_ids;  // [num_tokens, top_k]
  int64_t num_tokens;
  int top_k;
  int num_chunks;  // of tokens, as in common/chunk_sizes.h
  int num_experts;
  int num_local_experts;
  int64_t capacity;              // 0: none
  const int64_t* place_offsets;  // [num_chunks, num_experts + 1] of the places, without padding
  const int64_t* first_slots;    // [num_chunks, num_experts]
  int64_t* slot_of_copy;         // [num_tokens, top_k]; in: place or -1, out: owner and slot or -1
};

cudaError_t launch_place_peer_copies(const PeerCopyPlaces& places, cudaStream_t stream);

}  // namespace torch_moe_ep
