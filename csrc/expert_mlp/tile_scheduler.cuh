// Which tiles a CTA computes, from the device's expert offsets. Every role of the CTA walks the
// same sequence by itself, so nothing is communicated.
//
// The unit is a super tile: what one cluster computes at once, (kClusterM x kBlockM) x
// (kClusterN x kBlockN). Super tiles are numbered expert by expert; inside an expert in groups of
// group_m along M, M fastest, so that concurrent tiles share their operands in L2.
// Worked example, one expert, 3 x 2 super tiles, group_m = 2:  (m, n) = (0,0) (1,0) (0,1) (1,1)
// (2,0) (2,1). Cluster c takes numbers c, c + num_clusters, ...
#pragma once

#include <cstdint>

#include "expert_mlp/grouped_gemm.h"
#include "expert_mlp/tile_space.h"

namespace torch_moe_ep {

// In shared memory, filled once per CTA.
struct ExpertTable {
  int tile_offsets[kMaxLocalExperts + 1];  // super tiles before expert l
  int row_blocks[kMaxLocalExperts + 1];    // expert_offsets / kRowAlignment
};

struct Tile {
  int expert;
  int m;          // row of out inside the expert's part of it
  int n;          // column of out
  int row_begin;  // the expert's first row of the buffer
  int num_rows;   // the expert's rows, padding included
};

// By one whole warp; the caller synchronises. An exclusive prefix sum of super tiles over the
// experts.
__device__ inline void fill_expert_table(ExpertTable& table, const TileSpace& space, int super_m) {
  const int lane = threadIdx.x % 32;
  int carry = 0;
  for (int first = 0; first < space.num_experts; first += 32) {
    const int expert = first + lane;
    int tiles = 0;
    if (expert < space.num_experts) {
      const int64_t begin = space.expert_offsets[expert];
      const int rows = static_cast<int>(space.expert_offsets[expert + 1] - begin);
      const int tiles_m =
          space.fixed_tiles_m > 0 ? space.fixed_tiles_m : (rows + super_m - 1) / super_m;
      table.row_blocks[expert] = static_cast<int>(begin / kRowAlignment);
      tiles = tiles_m * space.tiles_n;
    }
    int sum = tiles;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (expert < space.num_experts) table.tile_offsets[expert] = carry + sum - tiles;
    carry += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) {
    table.tile_offsets[space.num_experts] = carry;
    table.row_blocks[space.num_experts] =
        static_cast<int>(space.expert_offsets[space.num_experts] / kRowAlignment);
  }
}

template <int kBlockM, int kBlockN, int kClusterM, int kClusterN>
class TileScheduler {
 public:
  static constexpr int kSuperM = kBlockM * kClusterM;

  __device__ TileScheduler(const ExpertTable& table, const TileSpace& space, int cta_rank)
      : table_(table),
        space_(space),
        cta_rank_(cta_rank),
        number_(blockIdx.x / (kClusterM * kClusterN)) {}

  __device__ __forceinline__ bool next(Tile& tile) {
    if (number_ >= table_.tile_offsets[space_.num_experts]) return false;
    while (number_ >= table_.tile_offsets[expert_ + 1]) ++expert_;
    const int row_blocks = table_.row_blocks[expert_ + 1] - table_.row_blocks[expert_];
    tile.expert = expert_;
    tile.row_begin = table_.row_blocks[expert_] * kRowAlignment;
    tile.num_rows = row_blocks * kRowAlignment;
    const int tiles_m =
        space_.fixed_tiles_m > 0 ? space_.fixed_tiles_m : (tile.num_rows + kSuperM - 1) / kSuperM;
    const int local = number_ - table_.tile_offsets[expert_];
    const int group_tiles = space_.group_m * space_.tiles_n;
    const int first_m = local / group_tiles * space_.group_m;
    const int group_m = min(space_.group_m, tiles_m - first_m);
    const int in_group = local % group_tiles;
    const int super_m = first_m + in_group % group_m;
    const int super_n = in_group / group_m;
    tile.m = (super_m * kClusterM + cta_rank_ / kClusterN) * kBlockM;
    tile.n = (super_n * kClusterN + cta_rank_ % kClusterN) * kBlockN;
    number_ += gridDim.x / (kClusterM * kClusterN);
    return true;
  }

 private:
  const ExpertTable& table_;
  const TileSpace& space_;
  int cta_rank_;
  int number_;
  int expert_ = 0;
};

}  // namespace torch_moe_ep
