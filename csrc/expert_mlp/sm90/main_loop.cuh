// The consumers' main loop: wgmma over the stages of one tile.
#pragma once

#include "expert_mlp/sm90/kernel_config.cuh"
#include "expert_mlp/sm90/ptx.cuh"
#include "expert_mlp/sm90/wgmma.cuh"

namespace torch_moe_ep::sm90 {

// Byte distances inside a stage of one operand; layouts in producer.cuh.
template <bool kIsMnMajor, bool kIsShared, int kExtent>
struct OperandLayout {
  static constexpr int kChunkK = kIsShared ? kStepK / 2 : kStepK;
  static constexpr int kChunkBytes = kIsMnMajor ? kChunkK * kStepRowBytes : kChunk * kStepRowBytes;

  // Of the 16-deep k step: 32 B along a K-major row; 16 rows of an MN-major chunk, whose second
  // half of k lies behind all chunks of the first if the load was shared.
  __device__ static constexpr int k16_offset(int k16) {
    if (!kIsMnMajor) return k16 * 32;
    const int k = k16 * 16;
    return k / kChunkK * (kExtent / kChunk) * kChunkBytes + k % kChunkK * kStepRowBytes;
  }
};

// Frees a stage: for this CTA's producer and, in a cluster, for the peer's, which writes it too.
template <class Config>
__device__ __forceinline__ void release_stage(uint32_t empty_barrier, int thread) {
  if (thread < Config::kClusterSize) {
    barrier_arrive_at<Config::kClusterSize>(empty_barrier, thread);
  }
}

// The same in all lanes, and known to the compiler to be: it then computes in uniform registers,
// where wgmma wants its descriptors.
__device__ __forceinline__ uint32_t uniform(uint32_t value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

// What a group multiplies: its rows of A and all of B, in one stage after another.
template <class Config>
struct StageOperands {
  using LayoutA = OperandLayout<Config::kTransposeA, (Config::kClusterN > 1), Config::kBlockM>;
  using LayoutB = OperandLayout<Config::kTransposeB, (Config::kClusterM > 1), Config::kBlockN>;
  using Instruction = Wgmma<Config::kBlockN, Config::kTransposeA, Config::kTransposeB>;
  MatrixDescriptor a, b;  // of stage 0

  // first_row: of the group, in A.
  __device__ __forceinline__ static StageOperands of(const SharedLayout<Config>& shared,
                                                     int first_row) {
    const uint32_t a = shared.a(0) + first_row / kChunk * LayoutA::kChunkBytes;
    return {MatrixDescriptor::of(a, LayoutA::kChunkBytes),
            MatrixDescriptor::of(shared.b(0), LayoutB::kChunkBytes)};
  }
  __device__ __forceinline__ StageOperands at(int stage) const {
    const int offset = stage * Config::kStageBytes;
    return {a.moved(offset), b.moved(offset)};
  }
  __device__ __forceinline__ StageOperands made_uniform() const {
    return {{uniform(a.low)}, {uniform(b.low)}};
  }
  __device__ __forceinline__ void multiply(float (&acc)[Config::kRowBlocks][Config::kBlockN / 2],
                                           bool is_first) const {
#pragma unroll
    for (int k16 = 0; k16 < kStepK / 16; ++k16) {
#pragma unroll
      for (int block = 0; block < Config::kRowBlocks; ++block) {
        Instruction::run(acc[block],
                         a.moved(block * LayoutA::kChunkBytes + LayoutA::k16_offset(k16)).value(),
                         b.moved(LayoutB::k16_offset(k16)).value(),
                         k16 > 0 || !is_first);
      }
    }
  }
};

// on_issued runs once the tile's last wgmma is issued, before it is waited for.
//
// Whole rounds of the ring are unrolled: where the compiler knows the stage, a step takes a third
// fewer instructions, and on a card at its power limit each of them costs time.
template <class Config, class OnIssued>
__device__ __forceinline__ void multiply_tile(float (&acc)[Config::kRowBlocks][Config::kBlockN / 2],
                                              const SharedLayout<Config>& shared,
                                              Ring<Config::kStages>& ring,
                                              int steps,
                                              int first_row,
                                              int thread,
                                              OnIssued on_issued) {
  constexpr int kStages = Config::kStages;
  const auto release_before = [&](int stage) {
    release_stage<Config>(shared.empty(stage == 0 ? kStages - 1 : stage - 1), thread);
  };
  const auto multiply_in = [&](int stage, const StageOperands<Config>& operands, bool is_first) {
    barrier_wait(shared.full(stage), ring.phase);
    wgmma_fence();
    operands.multiply(acc, is_first);
    wgmma_commit();
    wgmma_wait<1>();  // the previous stage's
    if (!is_first) release_before(stage);
  };
  const auto operands = StageOperands<Config>::of(shared, first_row);
  for (int step = 0; step < steps;) {
    if (ring.stage == 0 && steps - step >= kStages) {
      const StageOperands<Config> first = operands.made_uniform();
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        multiply_in(stage, first.at(stage), stage == 0 && step == 0);
      }
      ring.phase ^= 1;
      step += kStages;
    } else {
      multiply_in(ring.stage, operands.at(ring.stage).made_uniform(), step == 0);
      ring.next();
      ++step;
    }
  }
  on_issued();
  wgmma_wait<0>();
  if (steps > 0) release_before(ring.stage);
}

// A part that nobody stores (past its segment or past the matrix): keeps the stages turning. The
// group meets before it frees a stage, as a wgmma makes it meet elsewhere: a warp that came late
// would find the stage filled again and wait for the round after.
template <class Config>
__device__ __forceinline__ void discard_tile(const SharedLayout<Config>& shared,
                                             Ring<Config::kStages>& ring,
                                             int steps,
                                             int group,
                                             int thread) {
  for (int step = 0; step < steps; ++step) {
    barrier_wait(shared.full(ring.stage), ring.phase);
    named_barrier_sync(kGroupBarrier + group, kGroupThreads);
    release_stage<Config>(shared.empty(ring.stage), thread);
    ring.next();
  }
}

}  // namespace torch_moe_ep::sm90
