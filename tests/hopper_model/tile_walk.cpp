// Walks the tiles of a grouped GEMM as the CTAs of a kernel do and prints them.
//
//     tile_walk groups|columns CLUSTERS TILES_M TILES_N GROUP_M ROWS...
//
// TILES_M: super tiles along M of every expert; 0: from its rows. One line a tile: cluster, CTA of
// the cluster, expert, m, n, the expert's first row, its rows.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "expert_mlp/column_scheduler.cuh"

namespace {

using namespace torch_moe_ep;

constexpr int kBlockM = 128, kBlockN = 192, kClusterN = 2, kFewRows = 256;
using Groups = TileScheduler<kBlockM, kBlockN, 1, kClusterN>;
using Columns = ColumnScheduler<kBlockM, kBlockN, 1, kClusterN, kFewRows>;

template <class Scheduler>
void walk(const TileSpace& space, int num_clusters) {
  static typename Scheduler::Table table;
  device::run([&] {
    if (threadIdx.x < 32) Scheduler::fill(table, space);
  });
  device::Fiber walker = {};
  device::current = &walker;
  device::num_ctas = num_clusters * kClusterN;
  for (walker.cta = 0; walker.cta < device::num_ctas; ++walker.cta) {
    const int rank = walker.cta % kClusterN;
    Scheduler scheduler(table, space, rank);
    while (scheduler.advance()) {
      const Tile t = scheduler.tile();
      std::printf("%d %d %d %d %d %d %d\n",
                  walker.cta / kClusterN,
                  rank,
                  t.expert,
                  t.m,
                  t.n,
                  t.row_begin,
                  t.num_rows);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int64_t> offsets = {0};
  for (int i = 6; i < argc; ++i) offsets.push_back(offsets.back() + std::atoll(argv[i]));
  TileSpace space = {};
  space.segments.offsets = offsets.data();
  space.num_experts = static_cast<int>(offsets.size()) - 1;
  space.fixed_tiles_m = std::atoi(argv[3]);
  space.tiles_n = std::atoi(argv[4]);
  space.group_m = std::atoi(argv[5]);
  const int num_clusters = std::atoi(argv[2]);
  if (std::strcmp(argv[1], "columns") == 0) {
    walk<Columns>(space, num_clusters);
  } else {
    walk<Groups>(space, num_clusters);
  }
}
