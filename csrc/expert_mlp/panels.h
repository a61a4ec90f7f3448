// Products of packed panels: the inner kernels of the fp32 GEMMs on the CPU. No torch here.
//
// out = left right for left [M, depth] and right [depth, N]. A panel of left holds the same few
// rows for all of depth, step by step: [depth, width]; a panel of right likewise some columns. What
// lies past the matrix is zero there.
#pragma once

#include <cstdint>
#include <string>

namespace torch_moe_ep {

// Cache lines of rows of a matrix, to be asked for while something else is computed.
struct Prefetch {
  const char* row;        // the row that comes next
  int64_t stride;         // bytes from row to row
  int64_t lines_per_row;  // of 64 bytes
  int64_t line;           // the next one of that row
  int64_t count;          // lines, in all
};

struct PanelProduct {
  const float* left;   // [depth, panel_width]
  const float* right;  // [depth, panel_width], aligned as vectors are
  int64_t depth;
  float alpha;
  bool is_added;        // out += alpha * product, else out = alpha * product
  bool is_streamed;     // past the caches, where out is aligned: it is not read soon
  float* out;           // [num_rows, num_columns]
  int64_t out_stride;   // elements from row to row
  int64_t num_rows;     // of out: at most left's panel_width
  int64_t num_columns;  // of out: at most right's panel_width
  Prefetch prefetch;    // done as far as there are steps
};

// `width` rows of a matrix, `stride` elements apart and contiguous along depth.
struct TransposedPanel {
  const float* from;
  int64_t stride;
  int64_t depth;
  int64_t width;
  int64_t panel_width;  // at least width: at most lanes, or a multiple of lanes
  float* to;            // [depth, panel_width], with room for lanes more elements
};

// For every element of out the sum over depth runs in ascending order by fused multiply-adds,
// whichever instruction set, panel width, or place in a panel: all give the same bits.
struct PanelKernels {
  static constexpr int64_t kMaxRows = 8;
  static constexpr int64_t kMaxVectors = 3;
  int64_t lanes;    // fp32 elements of a vector
  int64_t rows;     // of a panel of left, at most
  int64_t vectors;  // of a step of right's panel, at most
  // By vectors and rows of the panels, from 1 on.
  void (*multiply[kMaxVectors + 1][kMaxRows + 1])(const PanelProduct& product);
  void (*pack_transposed)(const TransposedPanel& panel);
};

// For torch's name of the instruction sets in use ("AVX512", "AVX2"); nullptr where there are none.
const PanelKernels* find_panel_kernels(const std::string& cpu_capability);

const PanelKernels* avx512_panel_kernels();
const PanelKernels* avx2_panel_kernels();

}  // namespace torch_moe_ep
