#include "dispatch/peer_kernels.h"

#include <algorithm>

#include "common/peer_slot.h"
#include "common/vector.cuh"

namespace torch_moe_ep {
namespace {

// 32 warps with 4 accesses of 16 bytes a lane: 64 KiB in flight a multiprocessor, enough for the
// latency of memory at its share of NVLink.
constexpr int kPushThreads = 1024;
constexpr int kPushWarps = kPushThreads / kWarpSize;
constexpr int kAccessesPerLane = 4;
constexpr int kPaddingThreads = 256;
// A segment's padding is shared by so many blocks: 127 rows of 8 KiB are 1 MiB.
constexpr int kPaddingBlocks = 8;

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
      char* buffer = static_cast<char*>(p.buffers[slot >> kPeerOwnerShift]);
      Word* target =
          reinterpret_cast<Word*>(buffer + p.rows_offset) + (slot & kPeerSlotMask) * row_words;
#pragma unroll
      for (int i = 0; i < kAccessesPerLane; ++i) {
        const int64_t word = first_word + i * kWarpSize + lane;
        if (word < row_words) target[word] = words[i];
      }
    }
  }
}

// Blocks (segment, share of it). Rows beyond a capacity leave no padding.
template <typename Word>
__global__ void __launch_bounds__(kPaddingThreads) zero_padding(const SegmentPadding p) {
  const int segment = static_cast<int>(blockIdx.x);
  const int chunk = segment % p.num_chunks;
  const int64_t expert =
      static_cast<int64_t>(p.rank) * p.num_local_experts + segment / p.num_chunks;
  int64_t first = p.segment_offsets[segment];
  for (int source = 0; source < p.num_ranks; ++source) {
    const int64_t row = static_cast<int64_t>(chunk) * p.num_ranks + source;
    first += p.counts[row * p.num_experts + expert];
  }
  const int64_t num_rows = p.segment_offsets[segment + 1] - first;
  const int64_t row_words = p.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t thread = static_cast<int64_t>(blockIdx.y) * kPaddingThreads + threadIdx.x;
  Word* words = static_cast<Word*>(p.rows) + first * row_words;
  for (int64_t i = thread; i < num_rows * row_words; i += kPaddingBlocks * kPaddingThreads) {
    words[i] = Word{};
  }
  if (p.row_weights == nullptr) return;
  for (int64_t i = thread; i < num_rows; i += kPaddingBlocks * kPaddingThreads) {
    p.row_weights[first + i] = 0.0f;
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

// Buffers begin at multiples of 16 bytes on every rank, so the source's alignment decides.
cudaError_t launch_push_rows(const PushedRows& pushed, cudaStream_t stream) {
  const auto bits =
      reinterpret_cast<uintptr_t>(pushed.source) | static_cast<uintptr_t>(pushed.row_bytes);
  if (bits % kAccessBytes == 0) return launch_push_words<uint4>(pushed, stream);
  if (bits % sizeof(uint32_t) == 0) return launch_push_words<uint32_t>(pushed, stream);
  return launch_push_words<uint16_t>(pushed, stream);
}

cudaError_t launch_zero_padding(const SegmentPadding& padding, cudaStream_t stream) {
  const auto segments = static_cast<unsigned>(padding.num_local_experts * padding.num_chunks);
  const dim3 grid(segments, kPaddingBlocks);
  if (padding.row_bytes % kAccessBytes == 0) {
    zero_padding<uint4><<<grid, kPaddingThreads, 0, stream>>>(padding);
  } else {
    zero_padding<uint16_t><<<grid, kPaddingThreads, 0, stream>>>(padding);
  }
  return cudaGetLastError();
}

}  // namespace torch_moe_ep
