#include "combine/peer_kernels.h"

#include <algorithm>

#include "combine/pull_ring.cuh"
#include "common/peer_slot.h"
#include "common/vector.cuh"

namespace torch_moe_ep {
namespace {

// With so many rows a warp, warps take whole ones.
constexpr int64_t kRowsOfWarp = 2;

// What a lane makes of a part of an output's copies: their sums, those of sum_rows in
// combine_kernels.cu bit for bit.
template <typename T>
struct SummedPart {
  static constexpr int kCount = kAccessBytes / static_cast<int>(sizeof(T));
  float sums[kPullAccesses][kCount] = {};

  __device__ void add(const uint4* copy) {
#pragma unroll
    for (int i = 0; i < kPullAccesses; ++i) {
      float values[kCount];
      load_as_float(reinterpret_cast<const T*>(copy + i * blockDim.x), values);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[i][j] += values[j];
    }
  }

  __device__ void write(uint4* row, int64_t row_words, int part, int lane) {
#pragma unroll
    for (int i = 0; i < kPullAccesses; ++i) {
      const int64_t word = word_of_access(part, i, lane);
      if (word < row_words) store_from_float(reinterpret_cast<T*>(row + word), sums[i]);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[i][j] = 0.0f;
    }
  }
};

// Or the one copy.
struct CopiedPart {
  uint4 words[kPullAccesses];

  __device__ void add(const uint4* copy) {
#pragma unroll
    for (int i = 0; i < kPullAccesses; ++i) words[i] = copy[i * blockDim.x];
  }

  __device__ void write(uint4* row, int64_t row_words, int part, int lane) const {
#pragma unroll
    for (int i = 0; i < kPullAccesses; ++i) {
      const int64_t word = word_of_access(part, i, lane);
      if (word < row_words) row[word] = words[i];
    }
  }
};

// Rows of row_words whole words of 16 bytes.
template <typename Part>
__global__ void __launch_bounds__(kMaxPullThreads, 1)
    pull_rows(const PulledRows p, const PullTurns turns, int64_t row_words) {
  extern __shared__ uint4 ring[];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * warps;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarpSize;
  if (first >= turns.count) return;
  PullFetcher fetcher(p, turns, row_words, ring + threadIdx.x, first, num_warps);
  for (int ahead = 0; ahead + 1 < kPullStages; ++ahead) fetcher.fetch_next();
  PullPlace place(turns, first);
  Part made;
  int stage = 0;
  while (place.turn < turns.count) {
    fetcher.fetch_next();
    copy_async_wait<kPullStages - 1>();
    made.add(ring + stage * kPullAccesses * blockDim.x + threadIdx.x);
    stage = next_stage(stage);
    if (!place.end_copy(p.copies_per_output)) continue;
    uint4* row = static_cast<uint4*>(p.out) + place.turn / turns.per_row * row_words;
    made.write(row, row_words, place.part, lane);
    if (++place.part == place.end_part) place.enter(turns, place.turn + num_warps);
  }
}

// Rows of any size, element by element: a warp an output.
constexpr int kElementThreads = 768;

__device__ inline const char* row_of_slot(const PulledRows& p, int64_t slot, int64_t row_bytes) {
  return buffer_of_slot(p, slot) + p.rows_offset + (slot & kPeerSlotMask) * row_bytes;
}

template <typename T, bool kIsCopied>
__global__ void __launch_bounds__(kElementThreads, 1) pull_elements(const PulledRows p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  constexpr int kWarps = kElementThreads / kWarpSize;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t row_bytes = p.row_elements * static_cast<int64_t>(sizeof(T));
  const int num_copies = p.copies_per_output;
  for (int64_t output = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
       output < p.num_outputs;
       output += num_warps) {
    const int64_t* slots = p.slot_of_copy + output * num_copies;
    T* out = static_cast<T*>(p.out) + output * p.row_elements;
    for (int64_t column = lane; column < p.row_elements; column += kWarpSize) {
      float sum = 0.0f;
      T element = from_float<T>(0.0f);
      for (int k = 0; k < num_copies; ++k) {
        if (slots[k] < 0) continue;
        element = reinterpret_cast<const T*>(row_of_slot(p, slots[k], row_bytes))[column];
        sum += to_float(element);
      }
      out[column] = kIsCopied ? element : from_float<T>(sum);
    }
    if (p.weights == nullptr || lane >= num_copies) continue;
    p.weights[output * num_copies + lane] =
        slots[lane] >= 0 ? weight_of_slot(p, slots[lane]) : 0.0f;
  }
}

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

template <typename Part>
cudaError_t launch_ring(const PulledRows& p, int64_t row_words, cudaStream_t stream) {
  int device = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  const int warps = std::min(kMaxPullThreads, shared_bytes / kRingBytesOfThread) / kWarpSize;
  const int threads = warps * kWarpSize;
  const int ring_bytes = threads * kRingBytesOfThread;
  error = cudaFuncSetAttribute(
      pull_rows<Part>, cudaFuncAttributeMaxDynamicSharedMemorySize, ring_bytes);
  if (error != cudaSuccess) return error;
  const auto parts = static_cast<int>(ceil_div(row_words, kPartWords));
  const bool has_whole_rows = p.num_outputs >= kRowsOfWarp * warps * p.num_sms;
  const int per_row = has_whole_rows ? 1 : parts;
  const PullTurns turns = {p.num_outputs * per_row, per_row, has_whole_rows ? parts : 1, parts};
  const int64_t needed = ceil_div(turns.count, warps);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(needed, p.num_sms));
  pull_rows<Part><<<blocks, threads, ring_bytes, stream>>>(p, turns, row_words);
  return cudaGetLastError();
}

template <typename T, bool kIsCopied>
cudaError_t launch_elements(const PulledRows& p, cudaStream_t stream) {
  const int64_t needed = ceil_div(p.num_outputs, kElementThreads / kWarpSize);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(needed, p.num_sms));
  pull_elements<T, kIsCopied><<<blocks, kElementThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_of_type(const PulledRows& p, cudaStream_t stream) {
  const int64_t row_bytes = p.row_elements * static_cast<int64_t>(sizeof(T));
  const auto bits = reinterpret_cast<uintptr_t>(p.out) | static_cast<uintptr_t>(row_bytes);
  const bool is_one = p.copies_per_output == 1;
  if (bits % kAccessBytes != 0) {
    return is_one ? launch_elements<T, true>(p, stream) : launch_elements<T, false>(p, stream);
  }
  const int64_t row_words = row_bytes / kAccessBytes;
  return is_one ? launch_ring<CopiedPart>(p, row_words, stream)
                : launch_ring<SummedPart<T>>(p, row_words, stream);
}

}  // namespace

// Buffers begin at multiples of 16 bytes on every rank.
cudaError_t launch_pull_rows(const PulledRows& pulled, cudaStream_t stream) {
  if (pulled.num_outputs == 0 || pulled.row_elements == 0) return cudaSuccess;
  switch (pulled.element_type) {
    case ElementType::kFloat32:
      return launch_of_type<float>(pulled, stream);
    case ElementType::kBFloat16:
      return launch_of_type<__nv_bfloat16>(pulled, stream);
    case ElementType::kFloat16:
      return launch_of_type<__half>(pulled, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace torch_moe_ep
