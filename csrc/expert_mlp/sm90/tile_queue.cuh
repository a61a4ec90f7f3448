// Tiles handed out while the kernel runs. Whoever multiplies slower, or starts later because
// another kernel has its multiprocessor (rows or weights on their way to other GPUs), takes fewer
// of them: shared out beforehand, all would wait for him.
//
// One thread of a cluster takes the next number from a counter in device memory, which is zero when
// the kernel starts, and writes it to both CTAs, kTileSlots ahead at most. The first number past
// the last tile ends a cluster. Which cluster computes a tile leaves no trace in the results.
#pragma once

#include "expert_mlp/sm90/kernel_config.cuh"
#include "expert_mlp/sm90/ptx.cuh"

namespace torch_moe_ep::sm90 {

inline constexpr int kProducers = 2;  // threads, one for each operand
// Who says that it has done with a tile: the producers and each warp of the consumers.
inline constexpr int kTileReaders = kProducers + kConsumerGroups * kGroupThreads / 32;

template <class Config>
__device__ __forceinline__ void init_tile_barriers(const SharedLayout<Config>& shared) {
  for (int slot = 0; slot < kTileSlots; ++slot) {
    barrier_init(shared.tile_full(slot), 1);
    barrier_init(shared.tile_empty(slot), kTileReaders * Config::kClusterSize);
  }
}

// By one thread of the cluster's first CTA.
template <class Config>
__device__ __forceinline__ void hand_out_tiles(const KernelArguments& args,
                                               const SharedLayout<Config>& shared,
                                               int num_tiles) {
  Ring<kTileSlots> ring;
  int number = 0;
  do {  // also where there is no tile at all: the readers wait to be told
    barrier_wait(shared.tile_empty(ring.stage), ring.phase ^ 1);
    number = atomicAdd(args.next_tile, 1);
    if constexpr (Config::kClusterSize == 1) {
      store_shared(shared.tile_number(ring.stage), number);
      barrier_arrive(shared.tile_full(ring.stage));
    } else {
      for (int cta = 0; cta < Config::kClusterSize; ++cta) {
        store_remote(shared.tile_number(ring.stage), number, shared.tile_full(ring.stage), cta);
      }
    }
    ring.next();
  } while (number < num_tiles);
}

// The tiles of this cluster one after the other, as one role of a CTA sees them: a thread or, if
// kIsWarp, a warp.
template <class Config, class Scheduler, bool kIsWarp>
struct TileReader {
  const SharedLayout<Config>& shared;
  Scheduler scheduler;
  Ring<kTileSlots> ring;

  // False after the last one.
  __device__ __forceinline__ bool next() {
    if constexpr (Config::kHasQueue) {
      barrier_wait(shared.tile_full(ring.stage), ring.phase);
      return scheduler.go_to(read_number());
    } else {
      return scheduler.advance();
    }
  }
  // Another tile may be handed out in its place.
  __device__ __forceinline__ void release() {
    if constexpr (Config::kHasQueue) {
      if (speaks()) barrier_arrive_at<Config::kClusterSize>(shared.tile_empty(ring.stage), 0);
      ring.next();
    }
  }

 private:
  // Who of the reader reads the number and says that it is done.
  __device__ __forceinline__ static bool speaks() { return !kIsWarp || threadIdx.x % 32 == 0; }

  __device__ __forceinline__ int read_number() const {
    int number = 0;
    if (speaks()) number = load_shared(shared.tile_number(ring.stage));
    return kIsWarp ? __shfl_sync(0xffffffffu, number, 0) : number;
  }
};

}  // namespace torch_moe_ep::sm90
