#pragma once

// Kernels of peer_combine. Raw pointers and a stream, nothing of torch. Every pointer is device
// memory of this rank but what `buffers` names; the launcher returns the launch error.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element_type.h"

namespace torch_moe_ep {

// out[t] = sum over k of the row that slot_of_copy[t * copies_per_output + k] names on its owner,
// added in fp32 in ascending k and rounded once; a slot of -1 adds nothing. With one copy an output
// the row's bits are kept.
struct PulledRows {
  void* const* buffers;         // [num_ranks] where each rank's buffer is mapped
  int64_t rows_offset;          // bytes from a buffer's start to its rows, a multiple of 16
  int64_t weights_offset;       // bytes from a buffer's start to its row weights
  void* out;                    // [num_outputs, row_elements]
  float* weights;               // [num_outputs * copies_per_output], or null: row weights of copies
  const int64_t* slot_of_copy;  // [num_outputs * copies_per_output]; owner and slot, or -1
  int64_t num_outputs;
  int copies_per_output;  // at most 32
  int64_t row_elements;
  ElementType element_type;
  int num_sms;  // blocks, each of which fills a multiprocessor
};

cudaError_t launch_pull_rows(const PulledRows& pulled, cudaStream_t stream);

}  // namespace torch_moe_ep
