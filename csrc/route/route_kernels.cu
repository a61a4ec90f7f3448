#include "route/route_kernels.h"

#include <cmath>

#include "common/vector.cuh"

namespace torch_moe_ep {
namespace {

constexpr int kWarps = 8;

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, distance));
  }
  return value;
}

__device__ inline uint64_t warp_max(uint64_t value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = max(value, __shfl_xor_sync(kFullMask, value, distance));
  }
  return value;
}

// The warp's softmax over one row: lane holds the experts lane, lane + 32, ...; 0 past the last.
// A NaN among the logits makes every probability NaN, as in torch.
template <typename T, int kPerLane>
__device__ void softmax(const T* logits, int num_experts, int lane, float (&values)[kPerLane]) {
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    values[i] = expert < num_experts ? to_float(logits[expert]) : -INFINITY;
    largest = fmaxf(largest, values[i]);
  }
  largest = warp_max(largest);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool is_expert = i * kWarpSize + lane < num_experts;
    values[i] = is_expert ? expf(values[i] - largest) : 0.0f;
    sum += values[i];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) values[i] /= sum;
}

// Orders choices by (probability, smaller id first), NaN above all. Probabilities are not negative,
// so their bits order like their values. Every key is above 0, which stands for "taken".
__device__ inline uint64_t choice_key(float probability, int expert) {
  const uint32_t bits = isnan(probability) ? 0x7fffffffu : __float_as_uint(probability);
  return (static_cast<uint64_t>(bits) << 32) | (0xffffffffu - static_cast<uint32_t>(expert));
}

__device__ inline int64_t token_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
}

template <typename T, int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize) route_tokens(const RouteParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t token = token_of_warp();
  if (token >= p.num_tokens) return;
  float probabilities[kPerLane];
  softmax<T, kPerLane>(
      static_cast<const T*>(p.logits) + token * p.num_experts, p.num_experts, lane, probabilities);
  uint64_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    keys[i] = expert < p.num_experts ? choice_key(probabilities[i], expert) : 0;
  }

  float sum = 0.0f;
  float lane_weight = 0.0f;
  int lane_expert = 0;
  for (int k = 0; k < p.top_k; ++k) {
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = max(best, keys[i]);
    best = warp_max(best);
    const float weight = __uint_as_float(static_cast<uint32_t>(best >> 32));
    sum += weight;
    if (lane == k) {
      lane_weight = weight;
      lane_expert = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (keys[i] == best) keys[i] = 0;
    }
  }
  if (lane < p.top_k) {
    const int64_t copy = token * p.top_k + lane;
    p.weights[copy] = p.normalize ? lane_weight / sum : lane_weight;
    p.expert_ids[copy] = lane_expert;
  }
}

// With p = softmax(logits), g the gradient of the weights and sums over the chosen:
//   not normalised, w = p:      d logit_e = p_e * (g_e - sum g w), g_e = 0 for the others
//   normalised, w = p / sum p:  d logit_e = w_e * (g_e - sum g w), 0 for the others
template <typename T, int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    route_tokens_backward(const RouteBackwardParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t token = token_of_warp();
  if (token >= p.num_tokens) return;
  float grad = 0.0f;
  float weight = 0.0f;
  int chosen = -1;
  if (lane < p.top_k) {
    const int64_t copy = token * p.top_k + lane;
    grad = p.grad_weights[copy];
    weight = p.weights[copy];
    chosen = static_cast<int>(p.expert_ids[copy]);
  }
  const float dot = warp_sum(grad * weight);
  const float chosen_grad = weight * (grad - dot);

  float grads[kPerLane];
  if (p.normalize) {
    // Zero, and NaN where a NaN weight has made the whole row one.
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) grads[i] = 0.0f * fabsf(dot);
  } else {
    softmax<T, kPerLane>(
        static_cast<const T*>(p.logits) + token * p.num_experts, p.num_experts, lane, grads);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) grads[i] *= -dot;
  }
  for (int k = 0; k < p.top_k; ++k) {
    const int expert = __shfl_sync(kFullMask, chosen, k);
    const float value = __shfl_sync(kFullMask, chosen_grad, k);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i * kWarpSize + lane == expert) grads[i] = value;
    }
  }
  T* grad_logits = static_cast<T*>(p.grad_logits) + token * p.num_experts;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    if (expert < p.num_experts) grad_logits[expert] = from_float<T>(grads[i]);
  }
}

template <typename T, int kPerLane>
cudaError_t launch(const RouteParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((p.num_tokens + kWarps - 1) / kWarps);
  route_tokens<T, kPerLane><<<blocks, kWarps * kWarpSize, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, int kPerLane>
cudaError_t launch(const RouteBackwardParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((p.num_tokens + kWarps - 1) / kWarps);
  route_tokens_backward<T, kPerLane><<<blocks, kWarps * kWarpSize, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, typename Params>
cudaError_t launch_of_type(const Params& p, cudaStream_t stream) {
  if (p.num_experts <= 1 * kWarpSize) return launch<T, 1>(p, stream);
  if (p.num_experts <= 2 * kWarpSize) return launch<T, 2>(p, stream);
  if (p.num_experts <= 4 * kWarpSize) return launch<T, 4>(p, stream);
  if (p.num_experts <= 8 * kWarpSize) return launch<T, 8>(p, stream);
  return launch<T, kMaxRoutedExperts / kWarpSize>(p, stream);
}

template <typename Params>
cudaError_t launch_any(const Params& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  switch (p.element_type) {
    case ElementType::kFloat32:
      return launch_of_type<float>(p, stream);
    case ElementType::kBFloat16:
      return launch_of_type<__nv_bfloat16>(p, stream);
    case ElementType::kFloat16:
      return launch_of_type<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_route(const RouteParams& params, cudaStream_t stream) {
  return launch_any(params, stream);
}

cudaError_t launch_route_backward(const RouteBackwardParams& params, cudaStream_t stream) {
  return launch_any(params, stream);
}

}  // namespace torch_moe_ep
