#pragma once

// Device helpers of the memory-bound kernels: conversions to and from fp32, accesses of up to 16
// bytes, reductions in a fixed order. Knows no stage and includes nothing of torch.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace torch_moe_ep {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kAccessBytes = 16;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// The register word of an access of kBytes.
template <int kBytes>
struct WordOfBytes;
template <>
struct WordOfBytes<16> {
  using type = uint4;
};
template <>
struct WordOfBytes<4> {
  using type = uint32_t;
};
template <>
struct WordOfBytes<2> {
  using type = uint16_t;
};

// Reads kCount elements in one access and widens them. `source` is aligned to the access.
template <int kCount, typename T>
__device__ inline void load_as_float(const T* source, float (&values)[kCount]) {
  using Word = typename WordOfBytes<kCount * sizeof(T)>::type;
  const Word word = *reinterpret_cast<const Word*>(source);
  T elements[kCount];
  memcpy(&elements, &word, sizeof(word));
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = to_float(elements[i]);
}

// Rounds kCount values once and writes them in one access.
template <int kCount, typename T>
__device__ inline void store_from_float(T* target, const float (&values)[kCount]) {
  using Word = typename WordOfBytes<kCount * sizeof(T)>::type;
  T elements[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) elements[i] = from_float<T>(values[i]);
  Word word;
  memcpy(&word, &elements, sizeof(word));
  *reinterpret_cast<Word*>(target) = word;
}

// Sum over the warp in one fixed order; every lane has the result.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullMask, value, distance);
  }
  return value;
}

// Exclusive prefix sum over a block of kThreads threads; `total` is the sum over all of them.
// `scratch` holds kThreads / 32 values; every thread of the block takes part, and the caller may
// reuse `scratch` at once.
template <int kThreads>
__device__ inline int64_t block_exclusive_sum(int64_t value, int64_t* scratch, int64_t* total) {
  constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kWarps <= kWarpSize, "one warp scans the sums of all warps");
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int64_t inclusive = value;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int64_t below = __shfl_up_sync(kFullMask, inclusive, distance);
    if (lane >= distance) inclusive += below;
  }
  if (lane == kWarpSize - 1) scratch[warp] = inclusive;
  __syncthreads();
  int64_t before = 0;
  int64_t sum = 0;
#pragma unroll
  for (int other = 0; other < kWarps; ++other) {
    if (other < warp) before += scratch[other];
    sum += scratch[other];
  }
  __syncthreads();
  *total = sum;
  return before + inclusive - value;
}

}  // namespace torch_moe_ep
