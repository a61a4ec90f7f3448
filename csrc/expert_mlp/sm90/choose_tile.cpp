#include "expert_mlp/sm90/choose_tile.h"

namespace torch_moe_ep::sm90 {
namespace {

// Clusters of two load what they share once: on a card at its power limit the L2 traffic of single
// CTAs costs 0.05 to 0.3 of the rate (measured on an H200).
constexpr TileConfig kLargePair = {256, 192, false, 1, 2};
constexpr TileConfig kWidePair = {128, 256, false, 2, 1};
constexpr TileConfig kPingPongPair = {128, 192, true, 2, 1};
constexpr TileConfig kWideSingle = {128, 256, false, 1, 1};
constexpr TileConfig kPingPongSingle = {128, 192, true, 1, 1};

// Below this many rows an expert (padding counted, about 128 for each) the two row tiles of a pair
// would often be one real and one empty.
constexpr int64_t kPairRows = 320;
// From here on an expert has enough 256-row tiles for its half-empty last one not to count.
constexpr int64_t kManyRows = 2048;
// A 256 x 192 tile stores longest and needs a main loop as long (0.87 of ping-pong at K = 1024).
constexpr int64_t kLongK = 4096;
// While both groups of a tile store, nothing multiplies: as much time as this many columns of K
// (measured on an H200: 128 x 256 tiles reach 0.85 of ping-pong at K = 1024, 0.90 at 2048).
constexpr int64_t kEpilogueK = 300;

int64_t padded(int64_t columns, int64_t block) { return (columns + block - 1) / block * block; }

// 256-wide tiles may waste fewer columns than 192-wide ones (4096 columns: 0 against 3 %) but do
// not hide their epilogue; the longer K, the less that costs.
bool is_wide_better(const GroupedGemmShape& shape) {
  const int64_t k = shape.a_columns;
  return padded(shape.columns, 256) * (k + kEpilogueK) < padded(shape.columns, 192) * k;
}

}  // namespace

TileConfig choose_tile(const GroupedGemmShape& shape) {
  // Ping-pong: the epilogue, long beside few rows' main loop, runs under the other group's.
  if (shape.layout == GemmLayout::kTN) return kPingPongPair;
  const int64_t rows_per_expert = shape.num_experts > 0 ? shape.rows / shape.num_experts : 0;
  const bool is_pair = rows_per_expert >= kPairRows;
  if (shape.has_swiglu) return is_pair ? kPingPongPair : kPingPongSingle;
  if (!is_pair) return kWideSingle;
  if (is_wide_better(shape)) return kWidePair;
  const bool is_large =
      shape.layout == GemmLayout::kNT && rows_per_expert >= kManyRows && shape.a_columns >= kLongK;
  return is_large ? kLargePair : kPingPongPair;
}

}  // namespace torch_moe_ep::sm90
