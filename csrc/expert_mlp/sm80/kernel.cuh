// The generic grouped GEMM: persistent CTAs of 8 warps, cp.async stages, mma.sync.
#pragma once

#include "common/copy_async.cuh"
#include "expert_mlp/grouped_gemm.h"
#include "expert_mlp/sm80/operand.cuh"
#include "expert_mlp/tile_scheduler.cuh"

namespace torch_moe_ep::sm80 {

inline constexpr int kFragments = kStepK / 16;  // parts of a step

struct KernelArguments {
  const __nv_bfloat16* a;
  const __nv_bfloat16* b;
  __nv_bfloat16* out;
  TileSpace space;
  int64_t columns;    // N
  int64_t a_columns;  // K of NT and NN, M of TN
  float alpha;
};

template <GemmLayout kLayout_, int kBlockN_, int kStages_>
struct KernelConfig {
  static constexpr GemmLayout kLayout = kLayout_;
  static constexpr int kBlockM = 128;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kStages = kStages_;
  // 2 x 4 warps
  static constexpr int kWarpM = kBlockM / 2;
  static constexpr int kWarpN = kBlockN / 4;
  static constexpr int kBlocksM = kWarpM / 16;
  static constexpr int kBlocksN = kWarpN / 16;

  static constexpr bool kAIsMnMajor = kLayout == GemmLayout::kTN;
  static constexpr bool kBIsMnMajor = kLayout != GemmLayout::kNT;
  using OperandA = Operand<kAIsMnMajor, kBlockM>;
  using OperandB = Operand<kBIsMnMajor, kBlockN>;
  static constexpr int kStageBytes = OperandA::kStageBytes + OperandB::kStageBytes;
  static constexpr int kTableOffset = kStages * kStageBytes;
  static constexpr int kSharedBytes = kTableOffset + static_cast<int>(sizeof(ExpertTable));

  static_assert(kBlockM * kBlockN * 2 <= kTableOffset, "the epilogue reuses the stages");
};

template <class Config>
struct Accumulators {
  float values[Config::kBlocksM][Config::kBlocksN * 2][4];
};

template <class Config>
struct Fragments {
  uint32_t a[Config::kBlocksM][4];
  uint32_t b[Config::kBlocksN][4];

  __device__ __forceinline__ void load(uint32_t stage, int warp_m, int warp_n, int k16) {
#pragma unroll
    for (int i = 0; i < Config::kBlocksM; ++i) {
      load_matrix_x4<Config::kAIsMnMajor>(
          a[i], fragment_address<Config::kAIsMnMajor, false>(stage, warp_m + i * 16, k16));
    }
#pragma unroll
    for (int j = 0; j < Config::kBlocksN; ++j) {
      load_matrix_x4<Config::kBIsMnMajor>(
          b[j],
          fragment_address<Config::kBIsMnMajor, true>(
              stage + Config::OperandA::kStageBytes, warp_n + j * 16, k16));
    }
  }
};

template <class Config>
__device__ __forceinline__ void multiply(Accumulators<Config>& acc,
                                         const Fragments<Config>& fragments) {
#pragma unroll
  for (int i = 0; i < Config::kBlocksM; ++i) {
#pragma unroll
    for (int j = 0; j < Config::kBlocksN; ++j) {
      const auto& b = fragments.b[j];
      multiply_16x8x16(acc.values[i][2 * j], fragments.a[i], b[0], b[1]);
      multiply_16x8x16(acc.values[i][2 * j + 1], fragments.a[i], b[2], b[3]);
    }
  }
}

// What the layout makes of a tile.
template <class Config>
struct TileProblem {
  typename Config::OperandA a;
  typename Config::OperandB b;
  __nv_bfloat16* out;
  int steps;
  int num_rows;
};

template <class Config>
__device__ __forceinline__ TileProblem<Config> problem_of(const KernelArguments& args,
                                                          const Tile& tile) {
  const int64_t n = args.columns, k = args.a_columns;
  const int n_end = static_cast<int>(n), k_end = static_cast<int>(k);
  const __nv_bfloat16* a = args.a + tile.row_begin * k;
  const __nv_bfloat16* b = args.b;
  if (Config::kLayout == GemmLayout::kTN) {
    return {{a, k, tile.m, k_end, tile.num_rows},
            {b + tile.row_begin * n, n, tile.n, n_end, tile.num_rows},
            args.out + (tile.expert * k + tile.m) * n + tile.n,
            tile.num_rows / kStepK,
            k_end - tile.m};
  }
  return {{a, k, tile.m, tile.num_rows, k_end},
          {b + tile.expert * n * k, Config::kBIsMnMajor ? n : k, tile.n, n_end, k_end},
          args.out + (static_cast<int64_t>(tile.row_begin) + tile.m) * n + tile.n,
          (k_end + kStepK - 1) / kStepK,
          tile.num_rows - tile.m};
}

// Both operands' share of one of the kFragments parts that a stage is copied in.
template <class Config, int kPart>
__device__ __forceinline__ void load_part(TileProblem<Config>& problem, uint32_t stage) {
  using A = typename Config::OperandA;
  using B = typename Config::OperandB;
  constexpr int kShareA = A::kPasses / kFragments, kShareB = B::kPasses / kFragments;
  problem.a.template load<kPart * kShareA, kShareA>(stage);
  problem.b.template load<kPart * kShareB, kShareB>(stage + A::kStageBytes);
  if (kPart + 1 == kFragments) copy_async_commit();
}

// Positions in the ring of stages, as shared addresses.
template <class Config>
struct StageRing {
  uint32_t begin;
  uint32_t current;

  __device__ __forceinline__ void next() {
    current += Config::kStageBytes;
    if (current == begin + Config::kStages * Config::kStageBytes) current = begin;
  }
};

// One part of a step: fragments of the next part are read, and a part of the stage kStages - 1
// steps ahead is copied (zeros past the last step), under this part's mmas. The next step's first
// fragments are read under the last part, so that the barrier between steps is not followed by idle
// tensor cores.
template <class Config, int kPart>
__device__ __forceinline__ void multiply_part(Accumulators<Config>& acc,
                                              Fragments<Config> (&fragments)[2],
                                              TileProblem<Config>& problem,
                                              StageRing<Config>& read,
                                              StageRing<Config>& write,
                                              int warp_m,
                                              int warp_n) {
  load_part<Config, kPart>(problem, write.current);
  if constexpr (kPart + 1 == kFragments) {
    write.next();
    read.next();
    copy_async_wait<Config::kStages - 2>();
    __syncthreads();  // the next step is there, and nobody reads this step's stage any more
  }
  fragments[(kPart + 1) % 2].load(read.current, warp_m, warp_n, (kPart + 1) % kFragments);
  multiply<Config>(acc, fragments[kPart % 2]);
}

template <class Config>
__device__ __forceinline__ void multiply_tile(Accumulators<Config>& acc,
                                              TileProblem<Config>& problem,
                                              uint32_t shared,
                                              int warp_m,
                                              int warp_n) {
  StageRing<Config> read{shared, shared}, write{shared, shared};
  for (int step = 0; step < Config::kStages - 1; ++step) {
    load_part<Config, 0>(problem, write.current);
    load_part<Config, 1>(problem, write.current);
    load_part<Config, 2>(problem, write.current);
    load_part<Config, 3>(problem, write.current);
    write.next();
  }
  copy_async_wait<Config::kStages - 2>();
  __syncthreads();
  Fragments<Config> fragments[2];
  fragments[0].load(read.current, warp_m, warp_n, 0);
  for (int step = 0; step < problem.steps; ++step) {
    multiply_part<Config, 0>(acc, fragments, problem, read, write, warp_m, warp_n);
    multiply_part<Config, 1>(acc, fragments, problem, read, write, warp_m, warp_n);
    multiply_part<Config, 2>(acc, fragments, problem, read, write, warp_m, warp_n);
    multiply_part<Config, 3>(acc, fragments, problem, read, write, warp_m, warp_n);
  }
  copy_async_wait<0>();
  __syncthreads();  // the epilogue reuses the stages
}

// Through shared memory, [chunk of 64 columns][row][64 columns] and swizzled like a stage, so that
// global memory is written 16 bytes a thread. `out`: element (0, 0) of the tile.
template <class Config>
__device__ __forceinline__ void store_tile(const Accumulators<Config>& acc,
                                           uint8_t* shared,
                                           __nv_bfloat16* out,
                                           int64_t pitch,
                                           int num_rows,
                                           int num_columns,
                                           float alpha,
                                           int warp_m,
                                           int warp_n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Config::kBlocksM; ++i) {
#pragma unroll
    for (int j = 0; j < Config::kBlocksN * 2; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_m + i * 16 + half * 8 + lane / 4;
        const int column = warp_n + j * 8;
        const float* values = &acc.values[i][j][half * 2];
        auto* target = reinterpret_cast<__nv_bfloat162*>(
            shared + (column / 64 * Config::kBlockM + row) * kRowBytes +
            ((column % 64 / 8) ^ (row & 7)) * 16 + lane % 4 * 4);
        *target = __floats2bfloat162_rn(values[0] * alpha, values[1] * alpha);
      }
    }
  }
  __syncthreads();
  constexpr int kVectorsPerRow = Config::kBlockN / kVector;
  for (int index = threadIdx.x; index < Config::kBlockM * kVectorsPerRow; index += kThreads) {
    const int row = index / kVectorsPerRow, column = index % kVectorsPerRow * kVector;
    if (row < num_rows && column < num_columns) {
      const uint4 vector = *reinterpret_cast<const uint4*>(
          shared + (column / 64 * Config::kBlockM + row) * kRowBytes +
          ((column % 64 / 8) ^ (row & 7)) * 16);
      *reinterpret_cast<uint4*>(out + row * pitch + column) = vector;
    }
  }
  __syncthreads();  // before the next tile's copies land here
}

template <class Config>
__global__ void __launch_bounds__(kThreads, 1) grouped_gemm_kernel(const KernelArguments args) {
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(shared_bytes));
  auto& table = *reinterpret_cast<ExpertTable*>(shared_bytes + Config::kTableOffset);
  using Scheduler = TileScheduler<Config::kBlockM, Config::kBlockN, 1, 1>;
  if (threadIdx.x < 32) Scheduler::fill(table, args.space);
  __syncthreads();

  const int warp = threadIdx.x / 32;
  const int warp_m = warp % 2 * Config::kWarpM, warp_n = warp / 2 * Config::kWarpN;
  Scheduler scheduler(table, args.space, 0);
  Tile tile;
  while (scheduler.next(tile)) {
    TileProblem<Config> problem = problem_of<Config>(args, tile);
    Accumulators<Config> acc = {};
    multiply_tile<Config>(acc, problem, shared, warp_m, warp_n);
    store_tile<Config>(acc,
                       shared_bytes,
                       problem.out,
                       args.columns,
                       problem.num_rows,
                       static_cast<int>(args.columns) - tile.n,
                       args.alpha,
                       warp_m,
                       warp_n);
  }
}

}  // namespace torch_moe_ep::sm80
