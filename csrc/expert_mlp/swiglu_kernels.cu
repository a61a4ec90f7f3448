#include "expert_mlp/swiglu_kernels.h"

#include "common/vector.cuh"
#include "expert_mlp/fast_sigmoid.cuh"

namespace torch_moe_ep {
namespace {

constexpr int kMaxWarps = 8;
// Rows narrower than this are shared by a warp each instead of a block each.
constexpr int64_t kWarpRowWidth = 2048;

// What forward and backward need of one (gate, up) pair, in fp32.
struct Swiglu {
  float sigmoid;
  float silu;
  float hidden;  // silu(gate) * up
};

// fp32 data gets the exact exponential and division.
template <typename T>
__device__ inline Swiglu swiglu_of(float gate, float up) {
  Swiglu result;
  if constexpr (sizeof(T) == sizeof(float)) {
    result.sigmoid = 1.0f / (1.0f + expf(-gate));
  } else {
    result.sigmoid = fast_sigmoid(gate);
  }
  result.silu = gate * result.sigmoid;
  result.hidden = result.silu * up;
  return result;
}

// The elements of one row that one team of kWarps warps walks, kCount at a time.
template <int kWarps, int kCount>
struct RowTeam {
  static constexpr int kStride = kWarps * kWarpSize * kCount;
  static constexpr int kRowsPerBlock = kMaxWarps / kWarps;
  int64_t row;
  int64_t first;
  int warp;
  int lane;

  __device__ explicit RowTeam(unsigned block) {
    const int thread = static_cast<int>(threadIdx.x);
    lane = thread % kWarpSize;
    warp = thread / kWarpSize;
    row = static_cast<int64_t>(block) * kRowsPerBlock + warp / kWarps;
    first = static_cast<int64_t>(thread % (kWarps * kWarpSize)) * kCount;
  }
};

template <typename T, int kWarps, int kCount>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) swiglu_rows(const SwigluParams p) {
  const RowTeam<kWarps, kCount> team(blockIdx.x);
  if (team.row >= p.rows || !p.segments.has(team.row, p.num_experts)) return;
  const T* gates = static_cast<const T*>(p.z) + team.row * 2 * p.width;
  const T* ups = gates + p.width;
  T* activations = static_cast<T*>(p.activation) + team.row * p.width;
  const float row_weight = p.row_weights[team.row];
#pragma unroll 2
  for (int64_t i = team.first; i < p.width; i += team.kStride) {
    float gate[kCount];
    float up[kCount];
    load_as_float(gates + i, gate);
    load_as_float(ups + i, up);
    float activation[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      activation[j] = row_weight * swiglu_of<T>(gate[j], up[j]).hidden;
    }
    store_from_float(activations + i, activation);
  }
}

// With h = silu(gate) * up and a = row_weight * h, given da:
//   d row_weight = sum of da * h;  dh = row_weight * da
//   d up = dh * silu;  d gate = dh * up * sigmoid * (1 + gate * (1 - sigmoid))
// Each element of z is read before the same thread writes grad_z there: they may be one buffer.
// The last rows come first: of few rows, the GEMM before left theirs in L2, and the one behind
// begins with those that are written last.
template <typename T, int kWarps, int kCount>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    swiglu_rows_backward(const SwigluBackwardParams p) {
  const RowTeam<kWarps, kCount> team(gridDim.x - 1 - blockIdx.x);
  const SwigluParams& f = p.forward;
  // kWarps == kMaxWarps: one row a block, so the whole block leaves here or none of it.
  if (team.row >= f.rows || !f.segments.has(team.row, f.num_experts)) return;
  const T* gates = static_cast<const T*>(f.z) + team.row * 2 * f.width;
  const T* grads = static_cast<const T*>(p.grad_activation) + team.row * f.width;
  T* grad_gates = static_cast<T*>(p.grad_z) + team.row * 2 * f.width;
  T* activations =
      f.activation == nullptr ? nullptr : static_cast<T*>(f.activation) + team.row * f.width;
  const float row_weight = f.row_weights[team.row];
  float dot = 0.0f;
  for (int64_t i = team.first; i < f.width; i += team.kStride) {
    float gate[kCount];
    float up[kCount];
    float grad[kCount];
    load_as_float(gates + i, gate);
    load_as_float(gates + f.width + i, up);
    load_as_float(grads + i, grad);
    float activation[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const Swiglu swiglu = swiglu_of<T>(gate[j], up[j]);
      const float grad_h = row_weight * grad[j];
      dot += grad[j] * swiglu.hidden;
      activation[j] = row_weight * swiglu.hidden;
      gate[j] = grad_h * up[j] * swiglu.sigmoid * (1.0f + gate[j] * (1.0f - swiglu.sigmoid));
      up[j] = grad_h * swiglu.silu;
    }
    store_from_float(grad_gates + i, gate);
    store_from_float(grad_gates + f.width + i, up);
    if (activations != nullptr) store_from_float(activations + i, activation);
  }
  dot = warp_sum(dot);
  if constexpr (kWarps > 1) {
    __shared__ float warp_dots[kWarps];
    if (team.lane == 0) warp_dots[team.warp] = dot;
    __syncthreads();
    dot = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) dot += warp_dots[warp];
  }
  if (team.first == 0) p.grad_row_weights[team.row] = dot;
}

// One thread a row: neighbours read neighbouring sums. Eight loads are in flight at once.
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) add_up(const PartialSums p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows || !p.segments.has(row, p.num_experts)) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t part = 0; part < p.num_parts; ++part) sum += p.parts[part * p.rows + row];
  p.sums[row] = sum;
}

template <typename T, int kWarps, int kCount>
cudaError_t launch(const SwigluParams& p, cudaStream_t stream) {
  constexpr int kRows = RowTeam<kWarps, kCount>::kRowsPerBlock;
  const auto blocks = static_cast<unsigned>((p.rows + kRows - 1) / kRows);
  swiglu_rows<T, kWarps, kCount><<<blocks, kMaxWarps * kWarpSize, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, int kWarps, int kCount>
cudaError_t launch(const SwigluBackwardParams& p, cudaStream_t stream) {
  constexpr int kRows = RowTeam<kWarps, kCount>::kRowsPerBlock;
  const auto blocks = static_cast<unsigned>((p.forward.rows + kRows - 1) / kRows);
  swiglu_rows_backward<T, kWarps, kCount><<<blocks, kMaxWarps * kWarpSize, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, typename Params>
cudaError_t launch_of_type(const Params& p, int64_t width, bool is_aligned, cudaStream_t stream) {
  constexpr int kCount = kAccessBytes / static_cast<int>(sizeof(T));
  const bool is_narrow = width < kWarpRowWidth;
  if (is_aligned) {
    return is_narrow ? launch<T, 1, kCount>(p, stream) : launch<T, kMaxWarps, kCount>(p, stream);
  }
  return is_narrow ? launch<T, 1, 1>(p, stream) : launch<T, kMaxWarps, 1>(p, stream);
}

template <typename Params>
cudaError_t launch_any(const Params& p,
                       const SwigluParams& forward,
                       uintptr_t addresses,
                       cudaStream_t stream) {
  if (forward.rows == 0) return cudaSuccess;
  const auto row_bytes =
      static_cast<uintptr_t>(forward.width * element_bytes(forward.element_type));
  const bool is_aligned = (addresses | row_bytes) % kAccessBytes == 0;
  switch (forward.element_type) {
    case ElementType::kFloat32:
      return launch_of_type<float>(p, forward.width, is_aligned, stream);
    case ElementType::kBFloat16:
      return launch_of_type<__nv_bfloat16>(p, forward.width, is_aligned, stream);
    case ElementType::kFloat16:
      return launch_of_type<__half>(p, forward.width, is_aligned, stream);
  }
  return cudaErrorInvalidValue;
}

inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace

cudaError_t launch_swiglu(const SwigluParams& params, cudaStream_t stream) {
  return launch_any(params, params, address(params.z) | address(params.activation), stream);
}

cudaError_t launch_swiglu_backward(const SwigluBackwardParams& params, cudaStream_t stream) {
  const SwigluParams& forward = params.forward;
  const uintptr_t addresses = address(forward.z) | address(forward.activation) |
                              address(params.grad_activation) | address(params.grad_z);
  return launch_any(params, forward, addresses, stream);
}

cudaError_t launch_add_up(const PartialSums& params, cudaStream_t stream) {
  if (params.rows == 0) return cudaSuccess;
  // Blocks of one warp: a thread walks many parts, so that few rows still reach every
  // multiprocessor.
  const auto blocks = static_cast<unsigned>((params.rows + kWarpSize - 1) / kWarpSize);
  add_up<<<blocks, kWarpSize, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace torch_moe_ep
