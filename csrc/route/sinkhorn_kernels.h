#pragma once

// Kernel of sinkhorn. Raw pointers and a stream, nothing of torch. Every pointer is device memory.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element_type.h"

namespace torch_moe_ep {

// A warp holds one token's row, 16 experts a lane.
constexpr int kMaxSinkhornExperts = 512;

struct SinkhornParams {
  const void* logits;  // [num_tokens, num_experts]
  ElementType element_type;
  int64_t num_tokens;
  int num_experts;  // at most kMaxSinkhornExperts
  int num_iterations;
  int num_blocks;   // of sinkhorn_blocks
  double* partial;  // scratch [2, num_blocks, num_experts]
  float* plan;      // [num_tokens, num_experts]
};

// How many blocks launch_sinkhorn may use on the current device: all of them must run at once.
// Writes it into `num_blocks`; only element_type, num_tokens and num_experts of `params` are read.
cudaError_t sinkhorn_blocks(const SinkhornParams& params, int* num_blocks);

// One cooperative kernel for all iterations.
cudaError_t launch_sinkhorn(const SinkhornParams& params, cudaStream_t stream);

}  // namespace torch_moe_ep
