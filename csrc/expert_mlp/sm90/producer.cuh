// The producers: one thread for each operand that keeps its half of the stages full, running ahead
// of the consumers across tiles. (One thread for both is late at short K: it issues up to five
// loads a stage.)
//
// In a cluster of two the operand that both CTAs need is loaded half by each and multicast to both:
// a K-major operand is halved by rows, an MN-major one along K (its 64-wide chunks may be odd in
// number).
#pragma once

#include "expert_mlp/sm90/kernel_config.cuh"
#include "expert_mlp/sm90/ptx.cuh"
#include "expert_mlp/sm90/tile_queue.cuh"

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

enum class Operand { kA, kB };

template <class Config>
__device__ __forceinline__ void load_a(const KernelArguments& args,
                                       uint32_t shared,
                                       uint32_t barrier,
                                       const Tile& tile,
                                       int k,
                                       int half) {
  constexpr bool kIsShared = Config::kClusterN > 1;
  if constexpr (Config::kTransposeA) {
    load_mn_major<Config::kBlockM, kIsShared>(
        shared, args.a, barrier, tile.m, tile.row_begin + k, 0, half);
  } else {
    load_k_major<Config::kBlockM, kIsShared>(
        shared, args.a, barrier, k, tile.row_begin + tile.m, 0, half);
  }
}

template <class Config>
__device__ __forceinline__ void load_b(const KernelArguments& args,
                                       uint32_t shared,
                                       uint32_t barrier,
                                       const Tile& tile,
                                       int k,
                                       int half) {
  constexpr bool kIsShared = Config::kClusterM > 1;
  if constexpr (Config::kEpilogue == GemmEpilogue::kSwiglu) {
    load_gate_up<Config::kBlockN, kIsShared>(shared, args.b, barrier, k, tile, half);
  } else if constexpr (Config::kLayout == GemmLayout::kNT) {
    load_k_major<Config::kBlockN, kIsShared>(shared, args.b, barrier, k, tile.n, tile.expert, half);
  } else if constexpr (Config::kLayout == GemmLayout::kNN) {
    load_mn_major<Config::kBlockN, kIsShared>(
        shared, args.b, barrier, tile.n, k, tile.expert, half);
  } else {
    load_mn_major<Config::kBlockN, kIsShared>(
        shared, args.b, barrier, tile.n, tile.row_begin + k, 0, half);
  }
}

template <class Config>
__device__ __forceinline__ int num_k_steps(const KernelArguments& args, int num_rows) {
  return Config::kLayout == GemmLayout::kTN ? num_rows / kStepK : args.k_steps;
}

// Which stages still hold what a tile needs of B: stage s holds k step i of the same expert and n
// if its last load was for i, that is if the steps of a tile divide the stages and all of these
// were loaded since the panel began.
template <int kStages>
struct KeptPanel {
  int expert = -1;
  int n = -1;
  int loads = 0;

  __device__ __forceinline__ void enter(const Tile& tile) {
    if (tile.expert == expert && tile.n == n) return;
    expert = tile.expert;
    n = tile.n;
    loads = 0;
  }
  __device__ __forceinline__ bool holds_next(int steps) {
    if (steps > kStages || kStages % steps != 0) return false;
    return loads++ >= kStages;
  }
};

template <class Config, Operand kOperand, class Scheduler>
__device__ __forceinline__ void produce(const KernelArguments& args,
                                        const SharedLayout<Config>& shared,
                                        const Scheduler& scheduler,
                                        int cta_rank) {
  TileReader<Config, Scheduler, false> tiles{shared, scheduler};
  Ring<Config::kStages> ring;
  [[maybe_unused]] KeptPanel<Config::kStages> panel;
  while (tiles.next()) {
    const Tile tile = tiles.scheduler.tile();
    tiles.release();
    const int steps = num_k_steps<Config>(args, tile.num_rows);
    if constexpr (Config::kKeepsB) panel.enter(tile);
    for (int step = 0; step < steps; ++step) {
      const uint32_t full = shared.full(ring.stage);
      barrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
      // A peer's multicast may land before the bytes are expected: the transaction count may go
      // below zero meanwhile.
      if constexpr (kOperand == Operand::kA) {
        barrier_expect_bytes(full, Config::kABytes);
        load_a<Config>(args, shared.a(ring.stage), full, tile, step * kStepK, cta_rank);
      } else if (Config::kKeepsB && panel.holds_next(steps)) {
        barrier_arrive(full);
      } else {
        barrier_expect_bytes(full, Config::kBBytes);
        load_b<Config>(args, shared.b(ring.stage), full, tile, step * kStepK, cta_rank);
      }
      ring.next();
    }
  }
}

}  // namespace torch_moe_ep::sm90
