#include "route/sinkhorn_kernels.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>

#include "common/vector.cuh"

namespace torch_moe_ep {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, distance));
  }
  return value;
}

// The warp's softmax of one row plus offsets: lane holds the experts lane, lane + 32, ...; 0 past
// the last.
template <typename T, int kPerLane>
__device__ void shifted_softmax(
    const T* logits, const float* offsets, int num_experts, int lane, float (&row)[kPerLane]) {
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    row[i] = expert < num_experts ? to_float(logits[expert]) + offsets[expert] : -INFINITY;
    largest = fmaxf(largest, row[i]);
  }
  largest = warp_max(largest);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    row[i] = i * kWarpSize + lane < num_experts ? expf(row[i] - largest) : 0.0f;
    sum += row[i];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) row[i] /= sum;
}

// Column sums of this block's rows, in a fixed order, into `partial` [num_experts].
template <typename T, int kPerLane>
__device__ void sum_rows(const SinkhornParams& p,
                         const float* offsets,
                         float* scratch,
                         double* partial) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  float sums[kPerLane] = {};
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp; t < p.num_tokens;
       t += stride) {
    float row[kPerLane];
    shifted_softmax<T, kPerLane>(
        static_cast<const T*>(p.logits) + t * p.num_experts, offsets, p.num_experts, lane, row);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums[i] += row[i];
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    if (expert < p.num_experts) scratch[warp * p.num_experts + expert] = sums[i];
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < p.num_experts; e += kThreads) {
    double sum = 0.0;
    for (int w = 0; w < kWarps; ++w) sum += static_cast<double>(scratch[w * p.num_experts + e]);
    partial[e] = sum;
  }
}

// Every block adds up all blocks' sums in the same order, so all hold the same bits. The partial
// sums alternate between two buffers: one grid barrier an iteration is enough, as a block that
// writes buffer i + 2 has passed barrier i + 1, which nobody reaches before having read buffer i.
template <typename T, int kPerLane>
__global__ void __launch_bounds__(kThreads) sinkhorn_rows(const SinkhornParams p) {
  __shared__ float offsets[kPerLane * kWarpSize];  // log d1
  __shared__ float factors[kPerLane * kWarpSize];
  __shared__ float scratch[kWarps * kPerLane * kWarpSize];
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const double wanted = static_cast<double>(p.num_tokens) / p.num_experts;
  for (int e = static_cast<int>(threadIdx.x); e < p.num_experts; e += kThreads) offsets[e] = 0.0f;
  __syncthreads();
  for (int i = 0; i < p.num_iterations; ++i) {
    double* partial = p.partial + static_cast<int64_t>(i % 2) * p.num_blocks * p.num_experts;
    sum_rows<T, kPerLane>(
        p, offsets, scratch, partial + static_cast<int64_t>(blockIdx.x) * p.num_experts);
    grid.sync();
    for (int e = static_cast<int>(threadIdx.x); e < p.num_experts; e += kThreads) {
      double sum = 0.0;
      for (int64_t b = 0; b < p.num_blocks; ++b) sum += __ldcg(partial + b * p.num_experts + e);
      // Not fmax, which would hide a NaN. A share that underflowed is raised by a finite step.
      const auto step = static_cast<float>(log(wanted / (sum < 1e-37 ? 1e-37 : sum)));
      factors[e] = expf(step) / static_cast<float>(p.num_tokens);
      if (i + 1 < p.num_iterations) offsets[e] += step;
    }
    __syncthreads();
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp; t < p.num_tokens;
       t += stride) {
    float row[kPerLane];
    shifted_softmax<T, kPerLane>(
        static_cast<const T*>(p.logits) + t * p.num_experts, offsets, p.num_experts, lane, row);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = i * kWarpSize + lane;
      if (expert < p.num_experts) p.plan[t * p.num_experts + expert] = row[i] * factors[expert];
    }
  }
}

using Kernel = void (*)(SinkhornParams);

template <typename T>
Kernel kernel_of_type(int num_experts) {
  if (num_experts <= 1 * kWarpSize) return sinkhorn_rows<T, 1>;
  if (num_experts <= 4 * kWarpSize) return sinkhorn_rows<T, 4>;
  return sinkhorn_rows<T, kMaxSinkhornExperts / kWarpSize>;
}

Kernel kernel_of(const SinkhornParams& p) {
  switch (p.element_type) {
    case ElementType::kFloat32:
      return kernel_of_type<float>(p.num_experts);
    case ElementType::kBFloat16:
      return kernel_of_type<__nv_bfloat16>(p.num_experts);
    case ElementType::kFloat16:
      return kernel_of_type<__half>(p.num_experts);
  }
  return nullptr;
}

}  // namespace

cudaError_t sinkhorn_blocks(const SinkhornParams& params, int* num_blocks) {
  int device = 0;
  int num_sms = 0;
  int blocks_per_sm = 0;
  const Kernel kernel = kernel_of(params);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, kThreads, 0);
  if (error != cudaSuccess) return error;
  // More than one block an SM costs more in the reduction over blocks than it hides.
  const int64_t resident = blocks_per_sm > 0 ? num_sms : 0;
  *num_blocks = static_cast<int>(std::min(resident, (params.num_tokens + kWarps - 1) / kWarps));
  return cudaSuccess;
}

cudaError_t launch_sinkhorn(const SinkhornParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  const Kernel kernel = kernel_of(params);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  SinkhornParams copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(static_cast<unsigned>(params.num_blocks)),
                                     dim3(kThreads),
                                     arguments,
                                     0,
                                     stream);
}

}  // namespace torch_moe_ep
