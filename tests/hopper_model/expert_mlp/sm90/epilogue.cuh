// In the place of csrc's file of this name: instead of storing a tile, whether it was multiplied
// from the right steps in the right order.
#pragma once

#include <cuda_bf16.h>

#include "expert_mlp/sm90/kernel_config.cuh"
#include "expert_mlp/sm90/ptx.cuh"

namespace torch_moe_ep::sm90 {

inline std::map<std::vector<int>, int> num_stored;  // by expert, row, column

inline constexpr int kSwigluColumns = 32;
inline constexpr int kSwigluPartBytes = 64 * 64;

// What kernel.cuh and the epilogue of SwiGLU's gradient know of the buffers.
template <class Config>
struct StoreBuffers {
  const SharedLayout<Config>& shared;
  int group;
  int thread;
  uint32_t lane_offset = 0;

  void publish() { named_barrier_sync(kGroupBarrier + group, kGroupThreads); }
};

inline uint32_t pack_bf16(float, float) { return 0; }

template <class Config>
using Accumulators = float (&)[Config::kRowBlocks][Config::kBlockN / 2];

// The products of a group's part of a tile: its rows of A and its columns of B, step by step.
template <class Config>
void check_log(const std::vector<device::Product>& log, const device::Operand& a, int column) {
  for (int i = 0; i < static_cast<int>(log.size()); ++i) {
    const int block = i % Config::kRowBlocks, step = i / Config::kRowBlocks;
    const int k = a.k + step * 16;
    const device::Product& p = log[i];
    if (p.a != device::Operand{'A', a.mn + block * kChunk, k, 0}) device::fail("A of a step", i);
    const int expert = Config::kLayout == GemmLayout::kTN ? 0 : a.expert;
    if (p.b != device::Operand{'B', column, k, expert}) device::fail("B of a step", i);
    if (p.accumulates != (step > 0)) device::fail("the first product of a tile adds", i);
  }
}

// By one thread of a group that has stored its part of a tile. a: the first of A; its expert.
template <class Config>
void check_products(const device::Operand& a, int column, int num_steps) {
  ++num_stored[{a.expert, a.mn, column}];
  std::vector<device::Product>& log = device::group_of_current().log;
  const int wanted = num_steps * (kStepK / 16) * Config::kRowBlocks;
  if (static_cast<int>(log.size()) != wanted) device::fail("products of a tile", log.size());
  check_log<Config>(log, a, column);
  log.clear();
}

// By the whole group, which meets as it does where it stores.
template <class Config>
void check_part(const StoreBuffers<Config>& buffers,
                const device::Operand& a,
                int column,
                int num_steps) {
  named_barrier_sync(kGroupBarrier + buffers.group, kGroupThreads);
  if (buffers.thread == 0) check_products<Config>(a, column, num_steps);
  named_barrier_sync(kGroupBarrier + buffers.group, kGroupThreads);
}

inline int expert_of_row(const TileSpace& space, int row) {
  int expert = 0;
  while (space.segments.end(expert) <= row) ++expert;
  return expert;
}

template <class Config>
void store_tile(Accumulators<Config>,
                const KernelArguments& args,
                StoreBuffers<Config>& buffers,
                int row,
                int column,
                int expert) {
  if (Config::kLayout == GemmLayout::kTN) {
    const int begin = args.space.segments.begin(expert), end = args.space.segments.end(expert);
    check_part(buffers, {'A', row, begin, expert}, column, (end - begin) / kStepK);
  } else {
    check_part(buffers, {'A', row, 0, expert_of_row(args.space, row)}, column, args.k_steps);
  }
}

template <class Config>
void store_zeros(
    const KernelArguments& args, StoreBuffers<Config>& buffers, int row, int column, int expert) {
  check_part(buffers, {'A', row, 0, expert}, column, 0);
}

template <class Config>
void store_swiglu_tile(Accumulators<Config> acc,
                       const KernelArguments& args,
                       StoreBuffers<Config>& buffers,
                       int row,
                       int column) {
  store_tile<Config>(acc, args, buffers, row, column, 0);
}

template <class Config>
void scale_tile(Accumulators<Config>, float) {}

// Named by kernel.cuh for an epilogue that the model has no kernel of.
template <class Config>
void add_tile(Accumulators<Config>, const KernelArguments&, StoreBuffers<Config>&, int, int, int);

}  // namespace torch_moe_ep::sm90
