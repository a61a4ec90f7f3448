// SwiGLU and its gradient over expert-ordered rows, memory-bound. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element_type.h"
#include "expert_mlp/row_segments.h"

namespace torch_moe_ep {

// Rows that no expert has are neither read nor written. z is [R, 2I], gate columns first.
struct SwigluParams {
  int64_t rows;              // R, bounds the grid
  int64_t width;             // I; 16-byte accesses where I and the pointers allow them
  RowSegments segments;      // offsets: device
  int num_experts;           // L
  const void* z;             // [R, 2I]
  const float* row_weights;  // [R]
  void* activation;          // [R, I]: row_weight * silu(gate) * up, fp32 inside, one rounding
  ElementType element_type = ElementType::kBFloat16;  // of z, activation and their gradients
};

struct SwigluBackwardParams {
  SwigluParams forward;         // activation is recomputed; nullptr leaves it out
  const void* grad_activation;  // [R, I]
  void* grad_z;                 // [R, 2I]; may be the buffer of z
  float* grad_row_weights;      // [R]: sum over i of grad_activation * silu(gate) * up, in a fixed
                                // order (bit-equal from run to run, no atomics)
};

// sums[r] = the sum over part of parts[part, r], ascending. Rows that no expert has are not
// written.
struct PartialSums {
  int64_t rows;          // R
  RowSegments segments;  // offsets: device
  int num_experts;       // L
  int64_t num_parts;
  const float* parts;  // [num_parts, R]
  float* sums;         // [R]
};

cudaError_t launch_swiglu(const SwigluParams& params, cudaStream_t stream);
cudaError_t launch_swiglu_backward(const SwigluBackwardParams& params, cudaStream_t stream);
cudaError_t launch_add_up(const PartialSums& params, cudaStream_t stream);

}  // namespace torch_moe_ep
