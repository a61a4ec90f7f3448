// Which kernel takes a shape: a pure function of the shape, so that it can be tested without a
// device.
#pragma once

#include "expert_mlp/grouped_gemm.h"

namespace torch_moe_ep::sm90 {

// One CTA computes block_m x block_n; a cluster computes cluster_m x cluster_n of those and loads
// what they share once. Ping-pong: the two consumer groups take whole tiles in turn, so that one
// stores while the other multiplies; else they halve every tile along M.
struct TileConfig {
  int block_m;
  int block_n;
  bool is_ping_pong;
  int cluster_m;
  int cluster_n;
  // TN: while a cluster walks along M of an expert whose rows fit the stages, B is loaded once.
  bool keeps_b = false;
  int group_m = 8;  // see tile_scheduler.cuh

  bool operator==(const TileConfig&) const = default;
};

TileConfig choose_tile(const GroupedGemmShape& shape);

// As grouped_gemm of grouped_gemm.h with the tile given; cudaErrorInvalidValue if no kernel has it.
cudaError_t grouped_gemm_with_tile(const GroupedGemmParams& params,
                                   const TileConfig& tile,
                                   cudaStream_t stream);

}  // namespace torch_moe_ep::sm90
