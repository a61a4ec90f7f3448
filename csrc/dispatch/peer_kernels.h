#pragma once

// Kernels of peer_plan and peer_dispatch. Raw pointers and a stream, nothing of torch. Every
// pointer is device memory of this rank but what `buffers` names; every launcher returns the launch
// error.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace torch_moe_ep {

// Where each expert's segment lies on its owner, and in it this rank's copies. One block.
struct PeerSegments {
  const int64_t* counts;  // [num_ranks, num_experts]
  int num_ranks;
  int num_experts;  // at most kMaxExperts
  int rank;
  int row_alignment;
  int64_t capacity;         // of every rank's rows; 0: none
  int64_t* first_slots;     // [num_experts] slot of this rank's first copy for each expert
  int64_t* expert_offsets;  // [num_experts / num_ranks + 1] of this rank
  int64_t* slots_needed;    // [1]; grows to the most slots of any rank where that exceeds capacity
};

cudaError_t launch_place_segments(const PeerSegments& segments, cudaStream_t stream);

// From a copy's place in expert order to its slot on the owner.
struct PeerCopyPlaces {
  const int64_t* expert_ids;  // [num_copies]
  int64_t num_copies;
  int num_local_experts;
  int64_t capacity;                // 0: none
  const int64_t* segment_offsets;  // [num_experts + 1] of the places, without padding
  const int64_t* first_slots;      // [num_experts]
  int64_t* slot_of_copy;           // [num_copies]; in: place or -1, out: owner and slot or -1
};

cudaError_t launch_place_peer_copies(const PeerCopyPlaces& places, cudaStream_t stream);

// Writes source[s] into row slot_of_copy[s * copies_per_source + k] of its owner, for all k.
struct PushedRows {
  const void* source;           // [num_sources, row_bytes]
  const float* weights;         // [num_sources * copies_per_source], or null
  void* const* buffers;         // [num_ranks] where each rank's buffer is mapped
  int64_t weights_offset;       // bytes from a buffer's start to its row weights
  const int64_t* slot_of_copy;  // [num_sources * copies_per_source]; -1: nowhere
  int64_t num_sources;
  int copies_per_source;  // at most kMaxTopK
  int64_t row_bytes;
  int num_sms;  // blocks, each of which fills a multiprocessor
};

cudaError_t launch_push_rows(const PushedRows& pushed, cudaStream_t stream);

}  // namespace torch_moe_ep
