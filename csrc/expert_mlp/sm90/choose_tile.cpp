#include "expert_mlp/sm90/choose_tile.h"

#include <algorithm>

namespace torch_moe_ep::sm90 {
namespace {

// Clusters of two load what they share once: on a card at its power limit the L2 traffic of single
// CTAs costs 0.05 to 0.3 of the rate (measured on an H200).
constexpr TileConfig kLargePair = {256, 192, false, 1, 2};
constexpr TileConfig kWidePair = {128, 256, false, 2, 1};
constexpr TileConfig kTallPair = {256, 128, false, 1, 2};
constexpr TileConfig kPingPongPair = {128, 192, true, 2, 1};
constexpr TileConfig kNarrowPair = {128, 128, true, 2, 1};
constexpr TileConfig kFewRowsPair = {128, 192, true, 1, 2, true};
constexpr TileConfig kWideSingle = {128, 256, false, 1, 1};
constexpr TileConfig kPingPongSingle = {128, 192, true, 1, 1};

// Rows of an expert are a mean of the bound on all rows, which counts up to 128 of padding for
// each. Below this many the two row tiles of a pair would often be one real and one empty.
constexpr int64_t kPairRows = 320;
// From here on an expert has enough 256-row tiles for its half-empty last one not to count.
constexpr int64_t kManyRows = 2048;
// Up to here most experts have 128 or 256 rows: one 256-row tile takes all of them (with long K
// 0.92 of the time of 128 x 256 pairs on an H100), and a panel of B of a weight gradient fits the
// stages.
constexpr int64_t kFewRows = 448;
// Tiles of 256 rows store longest and need a main loop as long (256 x 192: 0.87 of ping-pong at
// K = 1024).
constexpr int64_t kLongK = 4096;
// While both groups of a tile store, nothing multiplies: as much time as this many columns of K
// (measured on an H200: 128 x 256 tiles reach 0.91 of ping-pong at K = 1024, 0.98 at 2048).
constexpr int64_t kEpilogueK = 200;
// Clusters of two on the 132 multiprocessors of an H100 or H200.
constexpr int64_t kClusters = 66;
// After this many rounds the clusters that idle in the last one cost nothing: what limits the
// others by then is power.
constexpr int64_t kManyRounds = 16;
// Elements of an expert's weight up to which few tiles share an operand's panel, so that L2 is read
// and filled most: there 128 x 256 tiles, which read least, win from kManyRows rows an expert on,
// 0.7 (1024 columns) to 0.95 (4096) of the time of ping-pong (measured on an H100).
constexpr int64_t kSmallWeight = int64_t{1} << 24;
// Where SwiGLU's gradient is taken in the epilogue: K long enough to hide it, and rows enough for
// the ping-pong tiles that hide it to be no slower than others (at 256 rows an expert they take
// 1.3 times as long). It brings 0.14 of the main loop's L2 traffic, which limits these tiles, so
// that columns must not be wasted besides.
constexpr int64_t kFusedRows = 1024;
// 128-wide tiles read more of L2: worth it where 192-wide ones waste more than this, in percent.
constexpr int64_t kNarrowPercent = 6;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns that all clusters compute together with pairs of 128-row tiles of this width, the columns
// past the edge and, of few rounds, the clusters that idle in the last one counted.
int64_t computed_columns(const GroupedGemmShape& shape, int64_t rows_per_expert, int64_t width) {
  const int64_t row_tiles = std::max<int64_t>(1, ceil_div(rows_per_expert - kRowAlignment, 256));
  const int64_t tiles = shape.num_experts * row_tiles * ceil_div(shape.columns, width);
  const int64_t rounds = ceil_div(tiles, kClusters);
  return (rounds < kManyRounds ? rounds * kClusters : tiles) * width;
}

// 256-wide tiles may waste less (4096 columns: 0 against 3 %) but do not hide their epilogue; the
// longer K, the less that costs.
bool is_wide_better(const GroupedGemmShape& shape, int64_t rows_per_expert) {
  const int64_t k = shape.a_columns;
  return computed_columns(shape, rows_per_expert, 256) * (k + kEpilogueK) <
         computed_columns(shape, rows_per_expert, 192) * k;
}

bool is_narrow_better(const GroupedGemmShape& shape) {
  const int64_t narrow = ceil_div(shape.columns, 128) * 128;
  const int64_t usual = ceil_div(shape.columns, 192) * 192;
  return narrow * (100 + kNarrowPercent) < usual * 100;
}

// Ping-pong: the epilogue, long beside few rows' main loop, runs under the other group's. From
// kLongK rows on the tile that reads L2 least wins for large weights too: 0.97 of the time of
// ping-pong at 4096 rows an expert (gate_up of Mixtral, an H200).
TileConfig choose_weight_gradient_tile(const GroupedGemmShape& shape, int64_t rows_per_expert) {
  if (rows_per_expert <= kFewRows) return kFewRowsPair;
  const bool is_small = shape.columns * shape.a_columns <= kSmallWeight;
  if (rows_per_expert >= (is_small ? kManyRows : kLongK)) return kWidePair;
  return is_narrow_better(shape) ? kNarrowPair : kPingPongPair;
}

}  // namespace

bool fuses_swiglu_backward(const GroupedGemmShape& shape) {
  return shape.layout == GemmLayout::kNN && shape.rows_per_expert() >= kFusedRows &&
         shape.a_columns >= kLongK && !is_narrow_better(shape);
}

TileConfig choose_tile(const GroupedGemmShape& shape) {
  const int64_t rows_per_expert = shape.rows_per_expert();
  if (shape.layout == GemmLayout::kTN) return choose_weight_gradient_tile(shape, rows_per_expert);
  const bool is_pair = rows_per_expert >= kPairRows;
  if (shape.epilogue == GemmEpilogue::kSwigluBackward) return kPingPongPair;
  if (shape.epilogue == GemmEpilogue::kSwiglu) return is_pair ? kPingPongPair : kPingPongSingle;
  if (!is_pair) return kWideSingle;
  if (rows_per_expert <= kFewRows && shape.a_columns >= kLongK) return kTallPair;
  if (is_wide_better(shape, rows_per_expert)) return kWidePair;
  const bool is_large =
      shape.layout == GemmLayout::kNT && rows_per_expert >= kManyRows && shape.a_columns >= kLongK;
  return is_large ? kLargePair : kPingPongPair;
}

}  // namespace torch_moe_ep::sm90
