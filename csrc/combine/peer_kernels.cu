#include "combine/peer_kernels.h"

#include <algorithm>

#include "common/peer_slot.h"
#include "common/vector.cuh"

namespace torch_moe_ep {
namespace {

// 24 warps with 8 accesses of 16 bytes a lane: 96 KiB in flight a multiprocessor, for the latency
// of a peer's memory; more would not fit into a thread's 80 registers.
constexpr int kThreads = 768;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kAccessesInFlight = 8;
constexpr int kCopiesOfARow = 4;  // accesses a lane where a row is copied

__device__ inline int64_t slot_of_lane(const PulledRows& p, int64_t output, int lane) {
  return lane < p.copies_per_output ? p.slot_of_copy[output * p.copies_per_output + lane] : -1;
}

// The weight of copy `lane` of an output.
__device__ inline void fetch_weight(const PulledRows& p, int64_t output, int64_t slot, int lane) {
  if (p.weights == nullptr || lane >= p.copies_per_output) return;
  float weight = 0.0f;
  if (slot >= 0) {
    const char* buffer = static_cast<const char*>(p.buffers[slot >> kPeerOwnerShift]);
    weight = reinterpret_cast<const float*>(buffer + p.weights_offset)[slot & kPeerSlotMask];
  }
  p.weights[output * p.copies_per_output + lane] = weight;
}

template <typename T>
__device__ inline const T* row_of_slot(const PulledRows& p, int64_t slot, int64_t row_words) {
  const char* buffer = static_cast<const char*>(p.buffers[slot >> kPeerOwnerShift]);
  return reinterpret_cast<const T*>(buffer + p.rows_offset) + (slot & kPeerSlotMask) * row_words;
}

// How a warp's accesses are spread: kSlots rows of copies are fetched before the first is added,
// each in kAccesses accesses a lane.
template <typename Element, int kElements, int kSlotsAtOnce, bool kHasOneRound = false>
struct PullShape {
  using T = Element;
  using Word = typename WordOfBytes<kElements* static_cast<int>(sizeof(T))>::type;
  static constexpr int kCount = kElements;  // elements of an access
  static constexpr int kSlots = kSlotsAtOnce;
  static constexpr bool kIsOneRound = kHasOneRound;  // an output has at most kSlots copies
  static constexpr int kAccesses = kAccessesInFlight / kSlots;
  static constexpr int kLaneStride = kWarpSize * kCount;
  static constexpr int kPartElements = kAccesses * kLaneStride;
};

// Fetches the words of the copies first_copy ... of one output, of absent ones nothing. num_left
// elements of the row are behind `first`, as far as they are this warp's.
template <typename Shape>
__device__ inline void fetch_words(const PulledRows& p,
                                   int first_copy,
                                   int64_t first,
                                   int num_left,
                                   int64_t slots,
                                   typename Shape::Word (&words)[Shape::kSlots][Shape::kAccesses],
                                   bool (&is_there)[Shape::kSlots]) {
#pragma unroll
  for (int k = 0; k < Shape::kSlots; ++k) {
    const int copy = first_copy + k;
    const int64_t slot = copy < p.copies_per_output ? __shfl_sync(kFullMask, slots, copy) : -1;
    is_there[k] = slot >= 0;
    if (slot < 0) continue;
    const auto* row = row_of_slot<typename Shape::T>(p, slot, p.row_elements) + first;
#pragma unroll
    for (int i = 0; i < Shape::kAccesses; ++i) {
      const bool is_inside = i * Shape::kLaneStride < num_left;
      words[k][i] =
          is_inside ? *reinterpret_cast<const typename Shape::Word*>(row + i * Shape::kLaneStride)
                    : typename Shape::Word{};
    }
  }
}

// Adds access i of the fetched copies in their order.
template <typename Shape>
__device__ inline void add_words(
    const typename Shape::Word (&words)[Shape::kSlots][Shape::kAccesses],
    const bool (&is_there)[Shape::kSlots],
    int i,
    float (&sums)[Shape::kCount]) {
#pragma unroll
  for (int k = 0; k < Shape::kSlots; ++k) {
    float values[Shape::kCount];
    load_as_float(reinterpret_cast<const typename Shape::T*>(&words[k][i]), values);
#pragma unroll
    for (int j = 0; j < Shape::kCount; ++j) sums[j] += is_there[k] ? values[j] : 0.0f;
  }
}

// One warp a part of an output; the sum is that of sum_rows in combine_kernels.cu, bit for bit.
template <typename Shape>
__device__ void sum_part(const PulledRows& p, int64_t output, int64_t first, int64_t slots) {
  const int64_t behind = p.row_elements - first;
  const int num_left = static_cast<int>(min(behind, int64_t{Shape::kPartElements}));
  auto* out = static_cast<typename Shape::T*>(p.out) + output * p.row_elements + first;
  float sums[Shape::kAccesses][Shape::kCount] = {};
  typename Shape::Word words[Shape::kSlots][Shape::kAccesses];
  bool is_there[Shape::kSlots];
  int copy = 0;
  // All rounds but the last; the last one's sums leave their registers one access after the other.
  for (; !Shape::kIsOneRound && copy + Shape::kSlots < p.copies_per_output; copy += Shape::kSlots) {
    fetch_words<Shape>(p, copy, first, num_left, slots, words, is_there);
#pragma unroll
    for (int i = 0; i < Shape::kAccesses; ++i) add_words<Shape>(words, is_there, i, sums[i]);
  }
  fetch_words<Shape>(p, copy, first, num_left, slots, words, is_there);
#pragma unroll
  for (int i = 0; i < Shape::kAccesses; ++i) {
    add_words<Shape>(words, is_there, i, sums[i]);
    if (i * Shape::kLaneStride < num_left) store_from_float(out + i * Shape::kLaneStride, sums[i]);
  }
}

// Warps stride over the parts; the slots of the next one are fetched while this one's rows travel.
template <typename Shape>
__global__ void __launch_bounds__(kThreads, 1)
    pull_sums(const PulledRows p, int64_t parts_per_row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t num_parts = p.num_outputs * parts_per_row;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t part = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (part >= num_parts) return;
  int64_t slots = slot_of_lane(p, part / parts_per_row, lane);
  while (part < num_parts) {
    const int64_t output = part / parts_per_row;
    const int64_t place = part - output * parts_per_row;
    const int64_t next = part + num_warps;
    const int64_t next_slots =
        next < num_parts ? slot_of_lane(p, next / parts_per_row, lane) : int64_t{-1};
    if (place == 0) fetch_weight(p, output, slots, lane);
    sum_part<Shape>(p, output, place * Shape::kPartElements + lane * Shape::kCount, slots);
    part = next;
    slots = next_slots;
  }
}

template <typename Word>
__global__ void __launch_bounds__(kThreads, 1)
    pull_copies(const PulledRows p, int64_t row_words, int64_t parts_per_row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t num_parts = p.num_outputs * parts_per_row;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t part = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
       part < num_parts;
       part += num_warps) {
    const int64_t output = part / parts_per_row;
    const int64_t place = part - output * parts_per_row;
    const int64_t slot = p.slot_of_copy[output];
    if (place == 0) fetch_weight(p, output, slot, lane);
    Word words[kCopiesOfARow] = {};
#pragma unroll
    for (int i = 0; i < kCopiesOfARow; ++i) {
      const int64_t word = (place * kCopiesOfARow + i) * kWarpSize + lane;
      if (slot >= 0 && word < row_words) words[i] = row_of_slot<Word>(p, slot, row_words)[word];
    }
    Word* out = static_cast<Word*>(p.out) + output * row_words;
#pragma unroll
    for (int i = 0; i < kCopiesOfARow; ++i) {
      const int64_t word = (place * kCopiesOfARow + i) * kWarpSize + lane;
      if (word < row_words) out[word] = words[i];
    }
  }
}

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

inline unsigned num_blocks(const PulledRows& p, int64_t parts_per_row) {
  const int64_t needed = ceil_div(p.num_outputs * parts_per_row, kWarps);
  return static_cast<unsigned>(std::min<int64_t>(needed, p.num_sms));
}

template <typename Shape>
cudaError_t launch_sums(const PulledRows& p, cudaStream_t stream) {
  const int64_t parts = ceil_div(p.row_elements, Shape::kPartElements);
  pull_sums<Shape><<<num_blocks(p, parts), kThreads, 0, stream>>>(p, parts);
  return cudaGetLastError();
}

template <typename Word>
cudaError_t launch_copies(const PulledRows& p, cudaStream_t stream) {
  const int64_t row_words =
      p.row_elements * element_bytes(p.element_type) / static_cast<int64_t>(sizeof(Word));
  const int64_t parts = ceil_div(row_words, kCopiesOfARow * kWarpSize);
  pull_copies<Word><<<num_blocks(p, parts), kThreads, 0, stream>>>(p, row_words, parts);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_sums_of_type(const PulledRows& p, bool is_aligned, cudaStream_t stream) {
  constexpr int kCount = kAccessBytes / static_cast<int>(sizeof(T));
  if (!is_aligned) return launch_sums<PullShape<T, 1, 4>>(p, stream);
  if (p.copies_per_output == 2) return launch_sums<PullShape<T, kCount, 2, true>>(p, stream);
  return launch_sums<PullShape<T, kCount, 4>>(p, stream);
}

}  // namespace

// Buffers begin at multiples of 16 bytes on every rank.
cudaError_t launch_pull_rows(const PulledRows& pulled, cudaStream_t stream) {
  if (pulled.num_outputs == 0 || pulled.row_elements == 0) return cudaSuccess;
  const int64_t row_bytes = pulled.row_elements * element_bytes(pulled.element_type);
  const auto bits = reinterpret_cast<uintptr_t>(pulled.out) | static_cast<uintptr_t>(row_bytes);
  const bool is_aligned = bits % kAccessBytes == 0;
  if (pulled.copies_per_output == 1) {
    if (is_aligned) return launch_copies<uint4>(pulled, stream);
    if (bits % sizeof(uint32_t) == 0) return launch_copies<uint32_t>(pulled, stream);
    return launch_copies<uint16_t>(pulled, stream);
  }
  switch (pulled.element_type) {
    case ElementType::kFloat32:
      return launch_sums_of_type<float>(pulled, is_aligned, stream);
    case ElementType::kBFloat16:
      return launch_sums_of_type<__nv_bfloat16>(pulled, is_aligned, stream);
    case ElementType::kFloat16:
      return launch_sums_of_type<__half>(pulled, is_aligned, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace torch_moe_ep
