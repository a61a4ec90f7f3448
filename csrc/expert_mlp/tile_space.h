// How the output of a grouped GEMM is cut into tiles; passed to the kernels by value. The walk over
// it is in tile_scheduler.cuh.
#pragma once

#include <cstdint>

#include "expert_mlp/row_segments.h"

namespace torch_moe_ep {

inline constexpr int kMaxGroupM = 16;

struct TileSpace {
  RowSegments segments;
  int num_experts;
  int fixed_tiles_m;  // super tiles along M of every expert (TN); 0: from the rows of the expert
  int tiles_n;        // super tiles along N
  int group_m;        // super tiles along M that are walked together, at most kMaxGroupM
};

}  // namespace torch_moe_ep
