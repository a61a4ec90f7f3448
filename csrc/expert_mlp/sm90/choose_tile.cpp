#include "expert_mlp/sm90/choose_tile.h"

namespace torch_moe_ep::sm90 {
namespace {

constexpr TileConfig kLarge = {256, 192, false, 1, 1};
constexpr TileConfig kLargePair = {256, 192, false, 1, 2};
constexpr TileConfig kWide = {128, 256, false, 1, 1};
constexpr TileConfig kPingPong = {128, 192, true, 1, 1};
constexpr TileConfig kPingPongPair = {128, 192, true, 2, 1};

// Below this many rows an expert a 256-row tile loses more to its half-empty last tile and to the
// last wave than its lower power buys.
constexpr int64_t kFewRows = 2048;

}  // namespace

TileConfig choose_tile(const GroupedGemmShape& shape) {
  const int64_t rows_per_expert = shape.rows / (shape.num_experts > 0 ? shape.num_experts : 1);
  const bool has_few_rows = rows_per_expert < kFewRows;
  if (shape.layout == GemmLayout::kTN) {
    // Few rows are a short K: the epilogue has to run under the other group's multiplication.
    if (has_few_rows) return kPingPongPair;
    TileConfig tile = kLargePair;
    tile.group_m = 16;
    return tile;
  }
  if (shape.has_swiglu) return has_few_rows ? kPingPong : kLargePair;
  if (!has_few_rows) return kLarge;
  const bool is_wide = shape.columns > shape.a_columns;
  return is_wide && shape.layout == GemmLayout::kNT ? kPingPong : kWide;
}

}  // namespace torch_moe_ep::sm90
