#include "dispatch/peer_kernels.h"

#include <algorithm>

#include "common/peer_slot.h"
#include "common/vector.cuh"
#include "dispatch/dispatch_kernels.h"

namespace torch_moe_ep {
namespace {

constexpr int kSegmentThreads = kMaxExperts;
constexpr int kPlaceThreads = 256;
// 32 warps with 4 accesses of 16 bytes a lane: 64 KiB in flight a multiprocessor, enough for the
// latency of memory at its share of NVLink.
constexpr int kPushThreads = 1024;
constexpr int kPushWarps = kPushThreads / kWarpSize;
constexpr int kAccessesPerLane = 4;

__device__ inline int64_t round_up_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Example: 2 ranks, 2 experts each, alignment 4, counts [[1, 2, 0, 3], [3, 3, 1, 0]]: the segments
// of rank 0 have 4 and 5 rows and begin at 0 and 4, and it needs 12; those of rank 1 have 1 and 3,
// begin at 0 and 4, and it needs 8. First slots of rank 1's copies: 1, 6, 0, 7.
__global__ void __launch_bounds__(kSegmentThreads) place_segments(const PeerSegments p) {
  __shared__ int64_t scratch[kSegmentThreads / kWarpSize];
  __shared__ int64_t starts[kMaxExperts];
  const int expert = static_cast<int>(threadIdx.x);
  const int num_local = p.num_experts / p.num_ranks;
  int64_t length = 0;
  int64_t before = 0;
  if (expert < p.num_experts) {
    for (int source = 0; source < p.num_ranks; ++source) {
      const int64_t count = p.counts[static_cast<int64_t>(source) * p.num_experts + expert];
      if (source < p.rank) before += count;
      length += count;
    }
  }
  const int64_t padded = round_up_to(length, p.row_alignment);
  int64_t total = 0;
  const int64_t start = block_exclusive_sum<kSegmentThreads>(padded, scratch, &total);
  starts[expert] = start;
  __syncthreads();
  if (expert >= p.num_experts) return;
  const int owner = expert / num_local;
  const int local = expert % num_local;
  const int64_t slot = start - starts[owner * num_local];
  const int64_t end = slot + padded;
  const int64_t limit = p.capacity > 0 ? p.capacity : total;
  p.first_slots[expert] = slot + before;
  if (owner == p.rank) p.expert_offsets[local] = min(slot, limit);
  if (local != num_local - 1) return;
  if (owner == p.rank) p.expert_offsets[num_local] = min(end, limit);
  // Integers alone, so order cannot matter.
  if (end > limit) atomicMax(reinterpret_cast<long long*>(p.slots_needed), end);
}

__global__ void __launch_bounds__(kPlaceThreads) place_peer_copies(const PeerCopyPlaces p) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kPlaceThreads;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kPlaceThreads + threadIdx.x; n < p.num_copies;
       n += stride) {
    const int64_t place = p.slot_of_copy[n];
    if (place < 0) continue;
    const int64_t expert = p.expert_ids[n];
    const int64_t slot = p.first_slots[expert] + place - p.segment_offsets[expert];
    const int64_t owner = expert / p.num_local_experts;
    const bool has_room = p.capacity == 0 || slot < p.capacity;
    p.slot_of_copy[n] = has_room ? (owner << kPeerOwnerShift) + slot : -1;
  }
}

// One warp a part of a source row, which is read once and written to each of its slots. Warps
// stride over the parts, so that the number of multiprocessors is the caller's to choose.
template <typename Word>
__global__ void __launch_bounds__(kPushThreads, 1)
    push_rows(const PushedRows p, int64_t parts_per_row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t row_words = p.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t num_parts = p.num_sources * parts_per_row;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kPushWarps;
  for (int64_t part = static_cast<int64_t>(blockIdx.x) * kPushWarps + threadIdx.x / kWarpSize;
       part < num_parts;
       part += num_warps) {
    const int64_t row = part / parts_per_row;
    const int64_t first_word = (part - row * parts_per_row) * (kAccessesPerLane * kWarpSize);
    const Word* source = static_cast<const Word*>(p.source) + row * row_words;
    Word words[kAccessesPerLane];
#pragma unroll
    for (int i = 0; i < kAccessesPerLane; ++i) {
      const int64_t word = first_word + i * kWarpSize + lane;
      if (word < row_words) words[i] = source[word];
    }
    const int64_t copy = row * p.copies_per_source + lane;
    const int64_t lane_slot = lane < p.copies_per_source ? p.slot_of_copy[copy] : -1;
    if (p.weights != nullptr && first_word == 0 && lane_slot >= 0) {
      char* buffer = static_cast<char*>(p.buffers[lane_slot >> kPeerOwnerShift]);
      auto* weights = reinterpret_cast<float*>(buffer + p.weights_offset);
      weights[lane_slot & kPeerSlotMask] = p.weights[copy];
    }
    for (int k = 0; k < p.copies_per_source; ++k) {
      const int64_t slot = __shfl_sync(kFullMask, lane_slot, k);
      if (slot < 0) continue;
      Word* target = static_cast<Word*>(p.buffers[slot >> kPeerOwnerShift]) +
                     (slot & kPeerSlotMask) * row_words;
#pragma unroll
      for (int i = 0; i < kAccessesPerLane; ++i) {
        const int64_t word = first_word + i * kWarpSize + lane;
        if (word < row_words) target[word] = words[i];
      }
    }
  }
}

template <typename Word>
cudaError_t launch_push_words(const PushedRows& p, cudaStream_t stream) {
  constexpr int64_t kPartBytes = sizeof(Word) * kAccessesPerLane * kWarpSize;
  const int64_t parts_per_row = std::max<int64_t>((p.row_bytes + kPartBytes - 1) / kPartBytes, 1);
  const int64_t needed = (p.num_sources * parts_per_row + kPushWarps - 1) / kPushWarps;
  if (needed == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(needed, p.num_sms));
  push_rows<Word><<<blocks, kPushThreads, 0, stream>>>(p, parts_per_row);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_place_segments(const PeerSegments& segments, cudaStream_t stream) {
  place_segments<<<1, kSegmentThreads, 0, stream>>>(segments);
  return cudaGetLastError();
}

cudaError_t launch_place_peer_copies(const PeerCopyPlaces& places, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 1024;
  const int64_t needed = (places.num_copies + kPlaceThreads - 1) / kPlaceThreads;
  if (needed == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(std::min(needed, kMaxBlocks));
  place_peer_copies<<<blocks, kPlaceThreads, 0, stream>>>(places);
  return cudaGetLastError();
}

// Buffers begin at multiples of 16 bytes on every rank, so the source's alignment decides.
cudaError_t launch_push_rows(const PushedRows& pushed, cudaStream_t stream) {
  const auto bits =
      reinterpret_cast<uintptr_t>(pushed.source) | static_cast<uintptr_t>(pushed.row_bytes);
  if (bits % kAccessBytes == 0) return launch_push_words<uint4>(pushed, stream);
  if (bits % sizeof(uint32_t) == 0) return launch_push_words<uint32_t>(pushed, stream);
  return launch_push_words<uint16_t>(pushed, stream);
}

}  // namespace torch_moe_ep
