// Compile-time shape of a kernel and its shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "expert_mlp/column_scheduler.cuh"
#include "expert_mlp/grouped_gemm.h"
#include "expert_mlp/sm90/choose_tile.h"
#include "expert_mlp/sm90/kernel_arguments.h"
#include "expert_mlp/tile_scheduler.cuh"

namespace torch_moe_ep::sm90 {

inline constexpr int kStepK = 64;  // K of a stage: one 128-byte swizzled row
inline constexpr int kStepRowBytes = 128;
inline constexpr int kChunk = 64;          // side of an epilogue chunk, width of an MN-major chunk
inline constexpr int kGroupThreads = 128;  // a warp group
inline constexpr int kConsumerGroups = 2;
inline constexpr int kThreads = (1 + kConsumerGroups) * kGroupThreads;
inline constexpr int kGroupBarrier = 1;  // named barriers 1, 2: where a consumer group meets
inline constexpr int kMaxStages = 8;
inline constexpr int kTileSlots = 2;  // tiles that a cluster may have been handed and not finished
inline constexpr int kMaxSharedBytes = 232448;  // what a CTA may have on sm_90

template <GemmLayout kLayout_,
          int kBlockM_,
          int kBlockN_,
          bool kIsPingPong_,
          int kClusterM_,
          int kClusterN_,
          int kStages_,
          int kStoreBuffers_,
          int kStoreBatch_ = 1,
          bool kKeepsB_ = false,
          GemmEpilogue kEpilogue_ = GemmEpilogue::kPlain>
struct KernelConfig {
  static constexpr GemmLayout kLayout = kLayout_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr bool kIsPingPong = kIsPingPong_;
  static constexpr int kClusterM = kClusterM_;
  static constexpr int kClusterN = kClusterN_;
  static constexpr int kClusterSize = kClusterM * kClusterN;
  static constexpr int kStages = kStages_;
  static constexpr int kStoreBuffers = kStoreBuffers_;  // of each consumer group
  static constexpr int kStoreBatch = kStoreBatch_;      // chunks between two barriers
  static constexpr GemmEpilogue kEpilogue = kEpilogue_;
  static constexpr bool kAccumulates = kEpilogue == GemmEpilogue::kAccumulate;
  static constexpr bool kReadsZ = kEpilogue == GemmEpilogue::kSwigluBackward;
  // See TileConfig::keeps_b. Experts whose rows fit the stages are walked column by column; columns
  // are shared out beforehand, other tiles are handed out (tile_queue.cuh).
  static constexpr bool kKeepsB = kKeepsB_;
  static constexpr bool kHasQueue = !kKeepsB;
  using Scheduler =
      std::conditional_t<kKeepsB,
                         ColumnScheduler<kBlockM, kBlockN, kClusterM, kClusterN, kStages_ * kStepK>,
                         TileScheduler<kBlockM, kBlockN, kClusterM, kClusterN>>;

  static constexpr bool kTransposeA = kLayout == GemmLayout::kTN;
  static constexpr bool kTransposeB = kLayout != GemmLayout::kNT;
  static constexpr int kGroupRows = kIsPingPong ? kBlockM : kBlockM / kConsumerGroups;
  static constexpr int kRowBlocks = kGroupRows / kChunk;  // 64-row accumulators of a thread
  static constexpr int kColumnChunks = kBlockN / kChunk;

  static constexpr int kABytes = kBlockM * kStepRowBytes;
  static constexpr int kBBytes = kBlockN * kStepRowBytes;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr bool kHasSwiglu = kEpilogue == GemmEpilogue::kSwiglu || kReadsZ;
  // Plain: a 64 x 64 chunk. Accumulating: 64 x 32 in fp32. SwiGLU, both ways: 64 x 32 of gate, up
  // and activation each.
  static constexpr int kStoreBufferBytes = kHasSwiglu ? 12288 : 8192;

  static constexpr int kStoreOffset = kStages * kStageBytes;
  static constexpr int kBarrierOffset =
      kStoreOffset + kConsumerGroups * kStoreBuffers * kStoreBufferBytes;
  static constexpr int kZBarrierOffset = kBarrierOffset + 2 * kMaxStages * 8;
  static constexpr int kNumZBarriers = kReadsZ ? kConsumerGroups * kStoreBuffers : 0;
  static constexpr int kQueueOffset = kZBarrierOffset + kNumZBarriers * 8;
  static constexpr int kTableOffset = kQueueOffset + (kHasQueue ? kTileSlots * 3 * 8 : 0);
  // 1024 more: the dynamic shared memory is aligned by hand.
  static constexpr int kSharedBytes =
      kTableOffset + static_cast<int>(sizeof(typename Scheduler::Table)) + 1024;

  static constexpr TileConfig tile() {
    return {kBlockM, kBlockN, kIsPingPong, kClusterM, kClusterN, kKeepsB};
  }

  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(kStages <= kMaxStages);
  static_assert(kClusterM == 1 || kClusterN == 1, "one operand is shared at most");
  static_assert(kClusterSize <= 2);
  static_assert(kEpilogue != GemmEpilogue::kSwiglu || kLayout == GemmLayout::kNT);
  static_assert(!kReadsZ || (kLayout == GemmLayout::kNN && kIsPingPong));
  static_assert(!kHasSwiglu || kStoreBatch == 1);
  static_assert(!kAccumulates || kLayout == GemmLayout::kTN);
  static_assert(!kKeepsB || (kLayout == GemmLayout::kTN && kClusterM == 1));
  static_assert(kStoreBuffers % kStoreBatch == 0 && kColumnChunks % kStoreBatch == 0);
};

// Ring of stages: `phase` is the parity of the round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int steps) {
    const int position = stage + steps;
    phase ^= (position / kStages) & 1;
    stage = position % kStages;
  }
};

// 32-bit shared addresses of the parts.
template <class Config>
struct SharedLayout {
  uint32_t base;  // 1024-aligned

  __device__ __forceinline__ uint32_t a(int stage) const {
    return base + stage * Config::kStageBytes;
  }
  __device__ __forceinline__ uint32_t b(int stage) const { return a(stage) + Config::kABytes; }
  __device__ __forceinline__ uint32_t store_buffer(int group, int buffer) const {
    return base + Config::kStoreOffset +
           (group * Config::kStoreBuffers + buffer) * Config::kStoreBufferBytes;
  }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return base + Config::kBarrierOffset + stage * 8;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return base + Config::kBarrierOffset + (kMaxStages + stage) * 8;
  }
  // z has landed in the store buffer
  __device__ __forceinline__ uint32_t z_full(int group, int buffer) const {
    return base + Config::kZBarrierOffset + (group * Config::kStoreBuffers + buffer) * 8;
  }
  // A tile's number, that it is there, and that all who read it are done with it.
  __device__ __forceinline__ uint32_t tile_number(int slot) const {
    return base + Config::kQueueOffset + slot * 8;
  }
  __device__ __forceinline__ uint32_t tile_full(int slot) const {
    return tile_number(kTileSlots + slot);
  }
  __device__ __forceinline__ uint32_t tile_empty(int slot) const {
    return tile_number(2 * kTileSlots + slot);
  }
};

}  // namespace torch_moe_ep::sm90
