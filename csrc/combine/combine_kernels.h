#pragma once

// Kernels of combine. Raw pointers and a stream, nothing of torch. Every pointer is device memory;
// the launcher returns the launch error.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element_type.h"

namespace torch_moe_ep {

// out[t] = sum over k of rows[slot_of_copy[t * copies_per_output + k]], added in fp32 in ascending
// k and rounded once; a slot of -1 adds nothing. With one copy an output the row's bits are kept.
struct GatheredRows {
  const void* rows;          // [slots, row_elements]
  const float* row_weights;  // [slots], or null
  void* out;                 // [num_outputs, row_elements]
  float* weights;            // [num_outputs * copies_per_output], or null: row_weights of each copy
  const int64_t* slot_of_copy;  // [num_outputs * copies_per_output]
  int64_t num_outputs;
  int copies_per_output;  // at most 32
  int64_t row_elements;
  ElementType element_type;
};

cudaError_t launch_gather_rows(const GatheredRows& gathered, cudaStream_t stream);

}  // namespace torch_moe_ep
