// SwiGLU and its gradient, limited by memory bandwidth: 16-byte streaming accesses, one pass.
#include <cuda_bf16.h>

#include <algorithm>

#include "expert_mlp/swiglu_kernels.h"

namespace torch_moe_ep {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;                  // bf16 values of a 16-byte access
constexpr int64_t kNarrowWidth = 2048;      // up to here one warp takes a row, else the block
constexpr int kBlocksPerLaunch = 132 * 16;  // rows are strided over; more blocks gain nothing

struct Vector {
  uint4 bits;

  __device__ __forceinline__ void unpack(float (&values)[kVector]) const {
    const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&bits);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const float2 pair = __bfloat1622float2(pairs[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
  __device__ __forceinline__ static Vector pack(const float (&values)[kVector]) {
    Vector result;
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(&result.bits);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    }
    return result;
  }
};

__device__ __forceinline__ Vector load(const void* base, int64_t element) {
  const auto* address = static_cast<const __nv_bfloat16*>(base) + element;
  return {__ldcs(reinterpret_cast<const uint4*>(address))};
}

__device__ __forceinline__ void store(void* base, int64_t element, const Vector& vector) {
  auto* address = static_cast<__nv_bfloat16*>(base) + element;
  __stcs(reinterpret_cast<uint4*>(address), vector.bits);
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// The sum over the kRowThreads threads of a row, valid in the first of them. A fixed tree:
// bit-equal from run to run.
template <int kRowThreads>
__device__ __forceinline__ float sum_of_row(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  if constexpr (kRowThreads > 32) {
    __shared__ float warp_sums[kThreads / 32];
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
      value = 0.0f;
      for (const float warp_sum : warp_sums) value += warp_sum;
    }
    __syncthreads();  // before the next row writes warp_sums
  }
  return value;
}

template <int kRowThreads>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const SwigluParams p) {
  constexpr int kRows = kThreads / kRowThreads;
  const int64_t num_rows = min(*p.num_rows, p.rows);
  for (int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kRowThreads; row < num_rows;
       row += int64_t{gridDim.x} * kRows) {
    const float weight = p.row_weights[row];
    for (int64_t i = threadIdx.x % kRowThreads * kVector; i < p.width; i += kRowThreads * kVector) {
      float gate[kVector], up[kVector], activation[kVector];
      load(p.z, row * 2 * p.width + i).unpack(gate);
      load(p.z, row * 2 * p.width + p.width + i).unpack(up);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        activation[v] = weight * (gate[v] * sigmoid(gate[v])) * up[v];
      }
      store(p.activation, row * p.width + i, Vector::pack(activation));
    }
  }
}

// With s = sigmoid(gate): d silu / d gate = s (1 + gate (1 - s)).
template <int kRowThreads>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(const SwigluBackwardParams p) {
  constexpr int kRows = kThreads / kRowThreads;
  const SwigluParams& f = p.forward;
  const int64_t num_rows = min(*f.num_rows, f.rows);
  for (int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kRowThreads; row < num_rows;
       row += int64_t{gridDim.x} * kRows) {
    const float weight = f.row_weights[row];
    const int64_t z_row = row * 2 * f.width;
    float row_sum = 0.0f;
#pragma unroll 2
    for (int64_t i = threadIdx.x % kRowThreads * kVector; i < f.width; i += kRowThreads * kVector) {
      float grad[kVector], gate[kVector], up[kVector];
      load(p.grad_activation, row * f.width + i).unpack(grad);
      load(f.z, z_row + i).unpack(gate);
      load(f.z, z_row + f.width + i).unpack(up);
      float activation[kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const float s = sigmoid(gate[v]);
        const float silu = gate[v] * s;
        const float product = silu * up[v];
        const float weighted_grad = grad[v] * weight;
        row_sum += grad[v] * product;
        activation[v] = weight * silu * up[v];
        gate[v] = weighted_grad * up[v] * (s * (1.0f + gate[v] * (1.0f - s)));
        up[v] = weighted_grad * silu;
      }
      store(p.grad_z, z_row + i, Vector::pack(gate));
      store(p.grad_z, z_row + f.width + i, Vector::pack(up));
      if (f.activation != nullptr) store(f.activation, row * f.width + i, Vector::pack(activation));
    }
    row_sum = sum_of_row<kRowThreads>(row_sum);
    if (threadIdx.x % kRowThreads == 0) p.grad_row_weights[row] = row_sum;
  }
}

bool is_valid(const SwigluParams& p) {
  return p.rows >= 0 && p.width > 0 && p.width % kVector == 0;
}

unsigned num_blocks(int64_t rows, int rows_per_block) {
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  return static_cast<unsigned>(std::min<int64_t>(blocks, kBlocksPerLaunch));
}

}  // namespace

cudaError_t launch_swiglu(const SwigluParams& p, cudaStream_t stream) {
  if (!is_valid(p)) return cudaErrorInvalidValue;
  if (p.rows == 0) return cudaSuccess;
  if (p.width <= kNarrowWidth) {
    swiglu_kernel<32><<<num_blocks(p.rows, kThreads / 32), kThreads, 0, stream>>>(p);
  } else {
    swiglu_kernel<kThreads><<<num_blocks(p.rows, 1), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

cudaError_t launch_swiglu_backward(const SwigluBackwardParams& p, cudaStream_t stream) {
  if (!is_valid(p.forward)) return cudaErrorInvalidValue;
  if (p.forward.rows == 0) return cudaSuccess;
  if (p.forward.width <= kNarrowWidth) {
    const unsigned blocks = num_blocks(p.forward.rows, kThreads / 32);
    swiglu_backward_kernel<32><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    swiglu_backward_kernel<kThreads><<<num_blocks(p.forward.rows, 1), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace torch_moe_ep
