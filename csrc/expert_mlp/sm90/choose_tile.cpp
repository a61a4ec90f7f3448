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

// Below this many rows an expert the two row tiles of a pair would often be one real and one empty.
constexpr int64_t kPairRows = 384;
// From here on an expert has enough 256-row tiles for its half-empty last one not to count.
constexpr int64_t kManyRows = 2048;

int64_t padded(int64_t columns, int64_t block) { return (columns + block - 1) / block * block; }

// 256-wide tiles waste at least 2 % fewer columns than 192-wide ones (4096 columns: 0 against 3 %).
bool fits_256_better(int64_t columns) {
  return padded(columns, 192) - padded(columns, 256) > columns / 50;
}

}  // namespace

TileConfig choose_tile(const GroupedGemmShape& shape) {
  // Ping-pong: the epilogue, long beside few rows' main loop, runs under the other group's.
  if (shape.layout == GemmLayout::kTN) return kPingPongPair;
  const int64_t rows_per_expert = shape.num_experts > 0 ? shape.rows / shape.num_experts : 0;
  const bool is_pair = rows_per_expert >= kPairRows;
  if (shape.has_swiglu) return is_pair ? kPingPongPair : kPingPongSingle;
  if (!is_pair) return kWideSingle;
  if (fits_256_better(shape.columns)) return kWidePair;
  const bool is_forward = shape.layout == GemmLayout::kNT;
  return is_forward && rows_per_expert >= kManyRows ? kLargePair : kPingPongPair;
}

}  // namespace torch_moe_ep::sm90
