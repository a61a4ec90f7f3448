#include "combine/combine_kernels.h"

#include "common/vector.cuh"

namespace torch_moe_ep {
namespace {

constexpr int kWarps = 8;
// 4 accesses of 16 bytes in flight a lane and slot: a warp sums 2 KiB of output.
constexpr int kAccessesPerLane = 4;

// The warp's output row and the first element of its part of it.
struct OutputPart {
  int64_t row;
  int64_t first_element;
};

template <int kPartElements>
__device__ inline OutputPart output_part(int64_t parts_per_row) {
  const int64_t unit =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t row = unit / parts_per_row;
  return {row, (unit - row * parts_per_row) * kPartElements};
}

// The slot of copy `lane` of an output; its weight is fetched by the warp of the first part.
__device__ inline int64_t lane_slot(const GatheredRows& p, const OutputPart& part, int lane) {
  if (lane >= p.copies_per_output) return -1;
  const int64_t copy = part.row * p.copies_per_output + lane;
  const int64_t slot = p.slot_of_copy[copy];
  if (p.weights != nullptr && part.first_element == 0) {
    p.weights[copy] = slot < 0 ? 0.0f : p.row_weights[slot];
  }
  return slot;
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    sum_rows(const GatheredRows p, int64_t parts_per_row) {
  constexpr int kLaneStride = kWarpSize * kCount;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const OutputPart part = output_part<kAccessesPerLane * kLaneStride>(parts_per_row);
  if (part.row >= p.num_outputs) return;
  const int64_t slots = lane_slot(p, part, lane);
  const int64_t first = part.first_element + lane * kCount;

  float sums[kAccessesPerLane][kCount] = {};
  // Two slots' loads are in flight before the first is added.
#pragma unroll 2
  for (int k = 0; k < p.copies_per_output; ++k) {
    const int64_t slot = __shfl_sync(kFullMask, slots, k);
    if (slot < 0) continue;
    const T* row = static_cast<const T*>(p.rows) + slot * p.row_elements;
    float values[kAccessesPerLane][kCount];
#pragma unroll
    for (int i = 0; i < kAccessesPerLane; ++i) {
      const int64_t element = first + i * kLaneStride;
      if (element < p.row_elements) {
        load_as_float(row + element, values[i]);
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) values[i][j] = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kAccessesPerLane; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[i][j] += values[i][j];
    }
  }
  T* out = static_cast<T*>(p.out) + part.row * p.row_elements;
#pragma unroll
  for (int i = 0; i < kAccessesPerLane; ++i) {
    const int64_t element = first + i * kLaneStride;
    if (element < p.row_elements) store_from_float(out + element, sums[i]);
  }
}

template <typename Word>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    copy_rows(const GatheredRows p, int64_t row_words, int64_t parts_per_row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const OutputPart part = output_part<kAccessesPerLane * kWarpSize>(parts_per_row);
  if (part.row >= p.num_outputs) return;
  const int64_t slot = __shfl_sync(kFullMask, lane_slot(p, part, lane), 0);
  const Word* row = static_cast<const Word*>(p.rows) + slot * row_words;
  Word* out = static_cast<Word*>(p.out) + part.row * row_words;
  Word words[kAccessesPerLane];
#pragma unroll
  for (int i = 0; i < kAccessesPerLane; ++i) {
    const int64_t word = part.first_element + i * kWarpSize + lane;
    words[i] = slot >= 0 && word < row_words ? row[word] : Word{};
  }
#pragma unroll
  for (int i = 0; i < kAccessesPerLane; ++i) {
    const int64_t word = part.first_element + i * kWarpSize + lane;
    if (word < row_words) out[word] = words[i];
  }
}

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

inline unsigned num_blocks(const GatheredRows& p, int64_t parts_per_row) {
  return static_cast<unsigned>(ceil_div(p.num_outputs * parts_per_row, kWarps));
}

template <typename T, int kCount>
cudaError_t launch_sum(const GatheredRows& p, cudaStream_t stream) {
  const int64_t parts = ceil_div(p.row_elements, kAccessesPerLane * kWarpSize * kCount);
  sum_rows<T, kCount><<<num_blocks(p, parts), kWarps * kWarpSize, 0, stream>>>(p, parts);
  return cudaGetLastError();
}

template <typename Word>
cudaError_t launch_copy(const GatheredRows& p, cudaStream_t stream) {
  const int64_t row_words =
      p.row_elements * element_bytes(p.element_type) / static_cast<int64_t>(sizeof(Word));
  const int64_t parts = ceil_div(row_words, kAccessesPerLane * kWarpSize);
  copy_rows<Word><<<num_blocks(p, parts), kWarps * kWarpSize, 0, stream>>>(p, row_words, parts);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_sum_of_type(const GatheredRows& p, bool is_aligned, cudaStream_t stream) {
  constexpr int kCount = kAccessBytes / static_cast<int>(sizeof(T));
  return is_aligned ? launch_sum<T, kCount>(p, stream) : launch_sum<T, 1>(p, stream);
}

}  // namespace

cudaError_t launch_gather_rows(const GatheredRows& gathered, cudaStream_t stream) {
  if (gathered.num_outputs == 0 || gathered.row_elements == 0) return cudaSuccess;
  const int64_t row_bytes = gathered.row_elements * element_bytes(gathered.element_type);
  const auto bits = reinterpret_cast<uintptr_t>(gathered.rows) |
                    reinterpret_cast<uintptr_t>(gathered.out) | static_cast<uintptr_t>(row_bytes);
  const bool is_aligned = bits % kAccessBytes == 0;
  if (gathered.copies_per_output == 1) {
    if (is_aligned) return launch_copy<uint4>(gathered, stream);
    if (bits % sizeof(uint32_t) == 0) return launch_copy<uint32_t>(gathered, stream);
    return launch_copy<uint16_t>(gathered, stream);
  }
  switch (gathered.element_type) {
    case ElementType::kFloat32:
      return launch_sum_of_type<float>(gathered, is_aligned, stream);
    case ElementType::kBFloat16:
      return launch_sum_of_type<__nv_bfloat16>(gathered, is_aligned, stream);
    case ElementType::kFloat16:
      return launch_sum_of_type<__half>(gathered, is_aligned, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace torch_moe_ep
