// Where the tile of a number lies, from the device's segment offsets; and which numbers a CTA
// computes where tiles are shared out beforehand: every role of the CTA then walks the same
// sequence by itself. (sm90/tile_queue.cuh hands them out while the kernel runs.)
//
// The unit is a super tile: what one cluster computes at once, (kClusterM x kBlockM) x
// (kClusterN x kBlockN). Super tiles are numbered expert by expert; inside an expert in groups of
// group_m along M, M fastest, so that concurrent tiles share their operands in L2.
// Worked example, one expert, 3 x 2 super tiles, group_m = 2:  (m, n) = (0,0) (1,0) (0,1) (1,1)
// (2,0) (2,1). Shared out beforehand, cluster c takes numbers c, c + num_clusters, ...
#pragma once

#include <cstdint>

#include "expert_mlp/grouped_gemm.h"
#include "expert_mlp/tile_space.h"

namespace torch_moe_ep {

// In shared memory, filled once per CTA.
struct ExpertTable {
  int tile_offsets[kMaxLocalExperts + 1];  // super tiles before expert l
  int first_blocks[kMaxLocalExperts];      // where the expert's rows begin / kRowAlignment
  int num_blocks[kMaxLocalExperts];        // how many they are / kRowAlignment
  uint32_t reciprocals[kMaxGroupM + 1];    // [d]: the least integer above 2^32 / d, for d >= 2
};

struct Tile {
  int expert;
  int m;          // row of out inside the expert's part of it
  int n;          // column of out
  int row_begin;  // the expert's first row of the buffer
  int num_rows;   // the expert's rows, padding included
};

// By one whole warp; the caller synchronises. An exclusive prefix sum of super tiles over the
// experts; those of at most `skipped_rows` rows count as having none.
__device__ inline void fill_expert_table(ExpertTable& table,
                                         const TileSpace& space,
                                         int super_m,
                                         int skipped_rows = -1) {
  const int lane = threadIdx.x % 32;
  static_assert(kMaxGroupM < 32, "one lane for each divisor");
  if (lane >= 2 && lane <= kMaxGroupM) table.reciprocals[lane] = 0xffffffffu / lane + 1;
  int carry = 0;
  for (int first = 0; first < space.num_experts; first += 32) {
    const int expert = first + lane;
    int tiles = 0;
    if (expert < space.num_experts) {
      const int64_t begin = space.segments.begin(expert);
      const int rows = static_cast<int>(space.segments.end(expert) - begin);
      const int tiles_m =
          space.fixed_tiles_m > 0 ? space.fixed_tiles_m : (rows + super_m - 1) / super_m;
      table.first_blocks[expert] = static_cast<int>(begin / kRowAlignment);
      table.num_blocks[expert] = rows / kRowAlignment;
      tiles = rows > skipped_rows ? tiles_m * space.tiles_n : 0;
    }
    int sum = tiles;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (expert < space.num_experts) table.tile_offsets[expert] = carry + sum - tiles;
    carry += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) table.tile_offsets[space.num_experts] = carry;
}

template <int kBlockM, int kBlockN, int kClusterM, int kClusterN>
class TileScheduler {
 public:
  using Table = ExpertTable;
  static constexpr int kSuperM = kBlockM * kClusterM;

  // As fill_expert_table.
  __device__ static void fill(Table& table, const TileSpace& space) {
    fill_expert_table(table, space, kSuperM);
  }

  __device__ TileScheduler(const ExpertTable& table, const TileSpace& space, int cta_rank)
      : table_(table),
        space_(space),
        cta_rank_(cta_rank),
        stride_(static_cast<int>(gridDim.x) / (kClusterM * kClusterN)),
        number_(static_cast<int>(blockIdx.x) / (kClusterM * kClusterN) - stride_) {}

  // Goes on to the cluster's next tile of those shared out beforehand; false after the last one.
  __device__ __forceinline__ bool advance() { return go_to(number_ + stride_); }

  // Goes on to a tile of a greater number; false after the last one. Cheap, so that who skips a
  // tile need not know where it lies.
  __device__ __forceinline__ bool go_to(int number) {
    minor_ += number - number_;
    number_ = number;
    if (number_ >= end_) enter_expert();
    if (expert_ >= space_.num_experts) return false;
    while (minor_ >= minor_size_) {
      minor_ -= minor_size_;
      major_ += space_.group_m;
    }
    return true;
  }

  // Rows of the tile's expert, padding included.
  __device__ __forceinline__ int num_rows() const { return num_rows_; }

  // Where the tile lies. Asks for advance() or go_to() before.
  __device__ __forceinline__ Tile tile() const {
    const int tiles_m =
        space_.fixed_tiles_m > 0 ? space_.fixed_tiles_m : (num_rows_ + kSuperM - 1) / kSuperM;
    const int group_m = min(space_.group_m, tiles_m - major_);
    // A division by multiplication: exact as minor_ < group_m * tiles_n < 2^32 / group_m.
    const int super_n = group_m == 1 ? minor_ : __umulhi(minor_, table_.reciprocals[group_m]);
    return tile_at(major_ + minor_ - super_n * group_m, super_n);
  }

  __device__ __forceinline__ bool next(Tile& result) {
    if (!advance()) return false;
    result = tile();
    return true;
  }

 protected:
  __device__ __forceinline__ void enter_expert() {
    while (expert_ < space_.num_experts && number_ >= table_.tile_offsets[expert_ + 1]) ++expert_;
    if (expert_ >= space_.num_experts) return;
    const int begin = table_.tile_offsets[expert_];
    end_ = table_.tile_offsets[expert_ + 1];
    read_rows();
    major_ = 0;
    minor_ = number_ - begin;
    minor_size_ = space_.group_m * space_.tiles_n;
  }

  __device__ __forceinline__ void read_rows() {
    row_begin_ = table_.first_blocks[expert_] * kRowAlignment;
    num_rows_ = table_.num_blocks[expert_] * kRowAlignment;
  }

  __device__ __forceinline__ Tile tile_at(int super_m, int super_n) const {
    Tile result;
    result.expert = expert_;
    result.m = (super_m * kClusterM + cta_rank_ / kClusterN) * kBlockM;
    result.n = (super_n * kClusterN + cta_rank_ % kClusterN) * kBlockN;
    result.row_begin = row_begin_;
    result.num_rows = num_rows_;
    return result;
  }

  const ExpertTable& table_;
  const TileSpace& space_;
  int cta_rank_;
  int stride_;  // clusters
  int number_;
  // Of the current expert, in registers: shared memory is read once an expert.
  int expert_ = 0;
  int end_ = 0;  // the first number past it
  int row_begin_ = 0;
  int num_rows_ = 0;
  // The place in it: number in the group, the group's first super tile along M.
  int minor_ = 0;
  int major_ = 0;
  int minor_size_ = 1;
};

}  // namespace torch_moe_ep
