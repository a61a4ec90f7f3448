#pragma once

// Kernels that move rows of tokens to their owners' buffers. Raw pointers and a stream, nothing of
// torch. Every pointer is device memory of this rank but what `buffers` names; every launcher
// returns the launch error.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace torch_moe_ep {

// Writes source[s] into row slot_of_copy[s * copies_per_source + k] of its owner, for all k.
struct PushedRows {
  const void* source;           // [num_sources, row_bytes]
  const float* weights;         // [num_sources * copies_per_source], or null
  void* const* buffers;         // [num_ranks] where each rank's buffer is mapped
  int64_t rows_offset;          // bytes from a buffer's start to its rows, a multiple of 16
  int64_t weights_offset;       // bytes from a buffer's start to its row weights
  const int64_t* slot_of_copy;  // [num_sources * copies_per_source]; -1: nowhere
  int64_t num_sources;
  int copies_per_source;  // at most kMaxTopK
  int64_t row_bytes;
  int num_sms;  // blocks, each of which fills a multiprocessor
};

cudaError_t launch_push_rows(const PushedRows& pushed, cudaStream_t stream);

// Zeros into the padding rows at each segment's end, in this rank's buffer.
struct SegmentPadding {
  void* rows;          // [slots, row_bytes], 16-byte aligned
  float* row_weights;  // [slots], or null
  int64_t row_bytes;
  const int64_t* segment_offsets;  // [num_local_experts * num_chunks + 1]
  const int64_t* counts;           // [num_chunks, num_ranks, num_experts]
  int num_chunks;
  int num_ranks;
  int num_experts;
  int num_local_experts;
  int rank;
};

cudaError_t launch_zero_padding(const SegmentPadding& padding, cudaStream_t stream);

}  // namespace torch_moe_ep
