#pragma once

// Kernels of route. Raw pointers and a stream, nothing of torch. Every pointer is device memory;
// every launcher returns the launch error.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/element_type.h"

namespace torch_moe_ep {

// A warp holds one token's probabilities, 16 a lane, and its choices, one a lane.
constexpr int kMaxRoutedExperts = 512;
constexpr int kMaxRoutedTopK = 32;

struct RouteParams {
  const void* logits;  // [num_tokens, num_experts]
  ElementType element_type;
  int64_t num_tokens;
  int num_experts;      // at most kMaxRoutedExperts
  int top_k;            // at most kMaxRoutedTopK and num_experts
  bool normalize;       // divide by the sum over the chosen
  float* weights;       // [num_tokens, top_k], descending
  int64_t* expert_ids;  // [num_tokens, top_k]; of equal weights the smaller id comes first
};

cudaError_t launch_route(const RouteParams& params, cudaStream_t stream);

struct RouteBackwardParams {
  const float* grad_weights;  // [num_tokens, top_k]
  const void* logits;         // [num_tokens, num_experts]
  ElementType element_type;   // of logits and grad_logits
  const float* weights;       // [num_tokens, top_k], as route returned them
  const int64_t* expert_ids;  // [num_tokens, top_k]
  int64_t num_tokens;
  int num_experts;
  int top_k;
  bool normalize;
  void* grad_logits;  // [num_tokens, num_experts]
};

cudaError_t launch_route_backward(const RouteBackwardParams& params, cudaStream_t stream);

}  // namespace torch_moe_ep
