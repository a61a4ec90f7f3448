// The persistent warp-specialised kernel: two warps of warp group 0 produce (one operand each), a
// third hands out tiles, warp groups 1 and 2 consume. Bodies exist for sm_90a alone; for other
// architectures of the same build the kernel is an empty stub.
#pragma once

#include "expert_mlp/sm90/epilogue.cuh"
#include "expert_mlp/sm90/main_loop.cuh"
#include "expert_mlp/sm90/producer.cuh"
#include "expert_mlp/sm90/swiglu_backward_epilogue.cuh"
#include "expert_mlp/sm90/swiglu_epilogue.cuh"
#include "expert_mlp/sm90/tile_queue.cuh"

namespace torch_moe_ep::sm90 {

inline constexpr int kOrderBarrier = 3;  // named barriers 3, 4: whose turn it is to multiply

// The ping-pong groups multiply in turn. Needed for correctness too: a group that waited for a
// stage two rounds ahead would take the old parity for its own.
template <class Config>
struct TurnOrder {
  int group;

  __device__ __forceinline__ void start() const {
    if (Config::kIsPingPong && group == 1) {
      named_barrier_arrive(kOrderBarrier, 2 * kGroupThreads);  // the first turn is group 0's
    }
  }
  __device__ __forceinline__ void wait() const {
    if (Config::kIsPingPong) named_barrier_sync(kOrderBarrier + group, 2 * kGroupThreads);
  }
  __device__ __forceinline__ void pass_on() const {
    if (Config::kIsPingPong) named_barrier_arrive(kOrderBarrier + 1 - group, 2 * kGroupThreads);
  }
};

template <class Config, class Scheduler>
__device__ __forceinline__ void consume(const KernelArguments& args,
                                        const SharedLayout<Config>& shared,
                                        const Scheduler& scheduler) {
  const int group = threadIdx.x / kGroupThreads - 1;
  const int thread = threadIdx.x % kGroupThreads;
  const int first_row = Config::kIsPingPong ? 0 : group * Config::kGroupRows;
  const TurnOrder<Config> order{group};
  TileReader<Config, Scheduler, true> tiles{shared, scheduler};
  StoreBuffers<Config> buffers{shared, group, thread};
  [[maybe_unused]] ZChunks<Config> z{args, shared, group, thread};
  Ring<Config::kStages> ring;
  float acc[Config::kRowBlocks][Config::kBlockN / 2];
  order.start();
  for (int turn = 0; tiles.next(); turn ^= 1) {
    const int steps = num_k_steps<Config>(args, tiles.scheduler.num_rows());
    if (Config::kIsPingPong && turn != group) {
      tiles.release();
      ring.skip(steps);
      continue;
    }
    const Tile tile = tiles.scheduler.tile();
    const int row = tile.m + first_row;
    const int num_rows = Config::kLayout == GemmLayout::kTN ? args.out_rows : tile.num_rows;
    const bool is_stored = row < num_rows && tile.n < args.columns;
    if constexpr (Config::kReadsZ) {
      if (is_stored) z.begin_tile(tile.row_begin + row, tile.n);
    }
    order.wait();
    if (!is_stored) {
      discard_tile<Config>(shared, ring, steps, group, thread);
      order.pass_on();
      tiles.release();
      continue;
    }
    multiply_tile<Config>(acc, shared, ring, steps, first_row, thread, [&] { order.pass_on(); });
    tiles.release();
    if constexpr (Config::kReadsZ) {
      store_swiglu_backward_tile<Config>(acc, args, buffers, z, tile.row_begin + row, tile.n);
    } else if constexpr (Config::kEpilogue == GemmEpilogue::kSwiglu) {
      store_swiglu_tile<Config>(acc, args, buffers, tile.row_begin + row, tile.n);
    } else if constexpr (Config::kLayout == GemmLayout::kTN) {
      if (steps == 0) {
        if constexpr (!Config::kAccumulates) {
          store_zeros(args, buffers, row, tile.n, tile.expert);
        }
        continue;
      }
      scale_tile<Config>(acc, args.alpha);
      if constexpr (Config::kAccumulates) {
        add_tile<Config>(acc, args, buffers, row, tile.n, tile.expert);
      } else {
        store_tile<Config>(acc, args, buffers, row, tile.n, tile.expert);
      }
    } else {
      store_tile<Config>(acc, args, buffers, tile.row_begin + row, tile.n, 0);
    }
  }
  if (thread == 0) tma_store_wait_all();  // the stores still read this CTA's shared memory
}

template <class Config>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ KernelArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t dynamic_shared[];
  const SharedLayout<Config> shared{(shared_address(dynamic_shared) + 1023) / 1024 * 1024};
  using Scheduler = typename Config::Scheduler;
  auto& table = *reinterpret_cast<typename Scheduler::Table*>(
      dynamic_shared + (shared.base - shared_address(dynamic_shared)) + Config::kTableOffset);

  if (threadIdx.x < 32) Scheduler::fill(table, args.space);
  if (threadIdx.x == 32) {
    constexpr int kReleases = (Config::kIsPingPong ? 1 : kConsumerGroups) * Config::kClusterSize;
    for (int stage = 0; stage < Config::kStages; ++stage) {
      barrier_init(shared.full(stage), 2);  // the two producers
      barrier_init(shared.empty(stage), kReleases);
    }
    for (int buffer = 0; buffer < Config::kNumZBarriers; ++buffer) {
      barrier_init(shared.z_full(0, buffer), 1);
    }
    if constexpr (Config::kHasQueue) init_tile_barriers<Config>(shared);
    fence_barrier_init();
    prefetch_tensor_map(args.a);
    prefetch_tensor_map(args.b);
    prefetch_tensor_map(args.out);
  }
  __syncthreads();
  if constexpr (Config::kClusterSize > 1) cluster_sync();

  const int cta_rank = Config::kClusterSize > 1 ? static_cast<int>(cluster_cta_rank()) : 0;
  const Scheduler scheduler(table, args.space, cta_rank);
  // 232 registers hold 192 accumulators; 40 + 2 x 232 = 504 of the 512 that 128 threads have.
  if (threadIdx.x < kGroupThreads) {
    decrease_registers<40>();
    if (threadIdx.x == 0) produce<Config, Operand::kA>(args, shared, scheduler, cta_rank);
    if (threadIdx.x == 32) produce<Config, Operand::kB>(args, shared, scheduler, cta_rank);
    if (Config::kHasQueue && threadIdx.x == 64 && cta_rank == 0) {
      hand_out_tiles<Config>(args, shared, table.tile_offsets[args.space.num_experts]);
    }
  } else {
    increase_registers<232>();
    consume<Config>(args, shared, scheduler);
  }
  if constexpr (Config::kClusterSize > 1) {
    __syncwarp();
    cluster_sync();  // a CTA that left could not be arrived at
  }
#endif
}

}  // namespace torch_moe_ep::sm90
