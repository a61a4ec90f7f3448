// The producer: one thread that keeps the stages full, running ahead of the consumers across tiles.
//
// In a cluster of two the operand that both CTAs need is loaded half by each and multicast to both:
// a K-major operand is halved by rows, an MN-major one along K (its 64-wide chunks may be odd in
// number).
#pragma once

#include "expert_mlp/sm90/kernel_config.cuh"
#include "expert_mlp/sm90/ptx.cuh"

namespace torch_moe_ep::sm90 {

inline constexpr uint16_t kBothCtas = 3;

// A box of kRows rows of 64 k. kIsShared: this CTA's half of them, multicast.
template <int kRows, bool kIsShared>
__device__ __forceinline__ void load_k_major(uint32_t shared,
                                             const CUtensorMap& map,
                                             uint32_t barrier,
                                             int k,
                                             int row,
                                             int expert,
                                             int half) {
  if constexpr (kIsShared) {
    constexpr int kHalf = kRows / 2;
    tma_load_3d_multicast(shared + half * kHalf * kStepRowBytes,
                          map,
                          barrier,
                          k,
                          row + half * kHalf,
                          expert,
                          kBothCtas);
  } else {
    tma_load_3d(shared, map, barrier, k, row, expert);
  }
}

// kColumns / 64 boxes of 64 columns and 64 k (32 k if shared).
// Shared memory: [chunk][64 k][64] or, if shared, [half of k][chunk][32 k][64].
template <int kColumns, bool kIsShared>
__device__ __forceinline__ void load_mn_major(uint32_t shared,
                                              const CUtensorMap& map,
                                              uint32_t barrier,
                                              int column,
                                              int k,
                                              int expert,
                                              int half) {
  constexpr int kChunks = kColumns / kChunk;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if constexpr (kIsShared) {
      constexpr int kBytes = kStepK / 2 * kStepRowBytes;
      tma_load_3d_multicast(shared + (half * kChunks + chunk) * kBytes,
                            map,
                            barrier,
                            column + chunk * kChunk,
                            k + half * (kStepK / 2),
                            expert,
                            kBothCtas);
    } else {
      tma_load_3d(shared + chunk * kStepK * kStepRowBytes,
                  map,
                  barrier,
                  column + chunk * kChunk,
                  k,
                  expert);
    }
  }
}

// 16 rows (8 of gate, 8 of up) of each of kRows / 16 groups.
template <int kRows, bool kIsShared>
__device__ __forceinline__ void load_gate_up(
    uint32_t shared, const CUtensorMap& map, uint32_t barrier, int k, const Tile& tile, int half) {
  if constexpr (kIsShared) {
    constexpr int kHalf = kRows / 2;
    tma_load_5d_multicast(shared + half * kHalf * kStepRowBytes,
                          map,
                          barrier,
                          k,
                          0,
                          0,
                          (tile.n + half * kHalf) / 16,
                          tile.expert,
                          kBothCtas);
  } else {
    tma_load_5d(shared, map, barrier, k, 0, 0, tile.n / 16, tile.expert);
  }
}

template <class Config>
__device__ __forceinline__ void load_stage(const KernelArguments& args,
                                           uint32_t a,
                                           uint32_t b,
                                           uint32_t barrier,
                                           const Tile& tile,
                                           int k,
                                           int half) {
  constexpr bool kShareA = Config::kClusterN > 1;
  constexpr bool kShareB = Config::kClusterM > 1;
  if constexpr (Config::kTransposeA) {
    load_mn_major<Config::kBlockM, kShareA>(
        a, args.a, barrier, tile.m, tile.row_begin + k, 0, half);
  } else {
    load_k_major<Config::kBlockM, kShareA>(a, args.a, barrier, k, tile.row_begin + tile.m, 0, half);
  }
  if constexpr (Config::kHasSwiglu) {
    load_gate_up<Config::kBlockN, kShareB>(b, args.b, barrier, k, tile, half);
  } else if constexpr (Config::kLayout == GemmLayout::kNT) {
    load_k_major<Config::kBlockN, kShareB>(b, args.b, barrier, k, tile.n, tile.expert, half);
  } else if constexpr (Config::kLayout == GemmLayout::kNN) {
    load_mn_major<Config::kBlockN, kShareB>(b, args.b, barrier, tile.n, k, tile.expert, half);
  } else {
    load_mn_major<Config::kBlockN, kShareB>(
        b, args.b, barrier, tile.n, tile.row_begin + k, 0, half);
  }
}

template <class Config>
__device__ __forceinline__ int num_k_steps(const KernelArguments& args, const Tile& tile) {
  return Config::kLayout == GemmLayout::kTN ? tile.num_rows / kStepK : args.k_steps;
}

template <class Config, class Scheduler>
__device__ __forceinline__ void produce(const KernelArguments& args,
                                        const SharedLayout<Config>& shared,
                                        Scheduler scheduler,
                                        int cta_rank) {
  Ring<Config::kStages> ring;
  Tile tile;
  while (scheduler.next(tile)) {
    const int steps = num_k_steps<Config>(args, tile);
    for (int step = 0; step < steps; ++step) {
      barrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
      // A peer's multicast may land before this: the transaction count may go below zero meanwhile.
      barrier_expect_bytes(shared.full(ring.stage), Config::kStageBytes);
      load_stage<Config>(args,
                         shared.a(ring.stage),
                         shared.b(ring.stage),
                         shared.full(ring.stage),
                         tile,
                         step * kStepK,
                         cta_rank);
      ring.next();
    }
  }
}

}  // namespace torch_moe_ep::sm90
