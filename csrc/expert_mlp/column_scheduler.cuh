// Tiles of a weight gradient, shared out beforehand, for kernels that keep their panel of B from
// tile to tile: experts of few rows are walked column by column.
//
// The columns of super tiles of all experts of at most kFewRows rows are numbered together, those
// of the experts with most rows first. As many columns as there are clusters are walked at once,
// one by each cluster, all of them from m = 0 on: whoever needs a panel of A needs it at about the
// same time, while it is in L2. The columns that are left then are cut into one run for
// each cluster, of equally many tiles.
// Worked example, 2 experts of 3 x 2 super tiles, 3 clusters: c takes column c (expert c / 2) from
// m = 0 to 2; of the fourth column cluster c takes the tile (c, 1) of expert 1.
//
// Experts with more rows follow, as tile_scheduler.cuh walks them.
#pragma once

#include "expert_mlp/tile_scheduler.cuh"

namespace torch_moe_ep {

struct ColumnTable : ExpertTable {
  int few_rows[kMaxLocalExperts];  // experts of few rows, those with most of them first
  int num_few_rows;
};

// Asks for space.fixed_tiles_m > 0.
template <int kBlockM, int kBlockN, int kClusterM, int kClusterN, int kFewRows>
class ColumnScheduler : public TileScheduler<kBlockM, kBlockN, kClusterM, kClusterN> {
  using Base = TileScheduler<kBlockM, kBlockN, kClusterM, kClusterN>;

 public:
  using Table = ColumnTable;

  // By one whole warp; the caller synchronises.
  __device__ static void fill(Table& table, const TileSpace& space) {
    fill_expert_table(table, space, Base::kSuperM, kFewRows);
    __syncwarp();
    int count = 0;
    for (int blocks = kFewRows / kRowAlignment; blocks >= 0; --blocks) {
      for (int first = 0; first < space.num_experts; first += 32) {
        const int lane = threadIdx.x % 32, expert = first + lane;
        const bool is_next = expert < space.num_experts && table.num_blocks[expert] == blocks;
        const uint32_t all = __ballot_sync(0xffffffffu, is_next);
        if (is_next) table.few_rows[count + __popc(all & ((1u << lane) - 1))] = expert;
        count += __popc(all);
      }
    }
    if (threadIdx.x % 32 == 0) table.num_few_rows = count;
  }

  __device__ ColumnScheduler(const Table& table, const TileSpace& space, int cta_rank)
      : Base(table, space, cta_rank), columns_(table) {}

  __device__ __forceinline__ bool advance() {
    if (is_column_) {
      ++minor_;
      if (minor_ < minor_size_ || next_column()) return true;
      leave_columns();
    }
    return Base::advance();
  }

  __device__ __forceinline__ Tile tile() const {
    return is_column_ ? this->tile_at(minor_, major_) : Base::tile();
  }

 private:
  // In columns: number_ is the column's, major_ its n, and minor_ goes on to minor_size_ along M.
  using Base::major_;
  using Base::minor_;
  using Base::minor_size_;
  using Base::number_;
  using Base::space_;
  using Base::stride_;

  __device__ __forceinline__ bool next_column() {
    const int tiles_m = space_.fixed_tiles_m;
    const int num_columns = columns_.num_few_rows * space_.tiles_n;
    const int num_rest = num_columns % stride_, num_whole = num_columns - num_rest;
    minor_ = 0;
    if (number_ < num_whole) {
      number_ += stride_;
      if (number_ < num_whole) {
        minor_size_ = tiles_m;
        enter_column();
        return true;
      }
      const int tiles = num_rest * tiles_m, cluster = number_ - num_whole;
      const int begin = cluster * (tiles / stride_) + min(cluster, tiles % stride_);
      left_ = tiles / stride_ + (cluster < tiles % stride_ ? 1 : 0);
      number_ = num_whole + begin / tiles_m;
      minor_ = begin % tiles_m;
    } else {
      ++number_;
    }
    if (left_ == 0) return false;
    minor_size_ = min(tiles_m, minor_ + left_);
    left_ -= minor_size_ - minor_;
    enter_column();
    return true;
  }

  __device__ __forceinline__ void enter_column() {
    this->expert_ = columns_.few_rows[number_ / space_.tiles_n];
    major_ = number_ % space_.tiles_n;
    this->read_rows();
  }

  __device__ __forceinline__ void leave_columns() {
    is_column_ = false;
    number_ = static_cast<int>(blockIdx.x) / (kClusterM * kClusterN) - stride_;
    this->expert_ = 0;
    minor_ = 0;
    minor_size_ = 1;
  }

  const Table& columns_;
  bool is_column_ = true;
  int left_ = 0;  // tiles of the cluster's run of the rest
};

}  // namespace torch_moe_ep
