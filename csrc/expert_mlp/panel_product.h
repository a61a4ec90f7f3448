// The bodies of PanelKernels, for vectors of any length. Included by one source per instruction
// set, behind its target pragma: everything here has internal linkage, so that no other source can
// end up with a copy made for a machine it does not run on.
#pragma once

#include <cstdint>
#include <utility>

#include "expert_mlp/panels.h"

namespace torch_moe_ep {
namespace {

// A vector at any address.
template <class Isa>
struct __attribute__((packed, may_alias)) Unaligned {
  typename Isa::Vector value;
};

// kRows x kVectors accumulators, kVectors operands and one broadcast must fit the vector registers.
// Isa: Vector, Mask (as many integers), kLanes, and stream(float* to, Vector), a store past the
// caches to an aligned address.
template <class Isa, int kRows, int kVectors>
struct PanelBlock {
  using Vector = typename Isa::Vector;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kColumns = kVectors * kLanes;

  static void multiply(const PanelProduct& product) {
    Vector sums[kRows][kVectors] = {};
    const float* left = product.left;
    const float* right = product.right;
    Prefetch prefetch = product.prefetch;
    for (int64_t step = 0; step < product.depth; ++step) {
      Vector operands[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        operands[v] = reinterpret_cast<const Vector*>(right)[v];
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[row][v] += left[row] * operands[v];
      }
      left += kRows;
      right += kColumns;
      if (step < prefetch.count) prefetch_line(prefetch);
    }
    if (product.num_rows < kRows || product.num_columns < kColumns) {
      write_part(product, sums);
    } else if (product.is_added) {
      write<Add>(product, sums);
    } else if (product.is_streamed && is_aligned(product)) {
      write<Stream>(product, sums);
    } else {
      write<Store>(product, sums);
    }
  }

 private:
  static void prefetch_line(Prefetch& prefetch) {
    __builtin_prefetch(prefetch.row + prefetch.line * 64, /*rw=*/0, /*locality=*/2);
    if (++prefetch.line == prefetch.lines_per_row) {
      prefetch.line = 0;
      prefetch.row += prefetch.stride;
    }
  }

  struct Add {
    static void write(float* to, Vector value) {
      reinterpret_cast<Unaligned<Isa>*>(to)->value += value;
    }
  };
  struct Store {
    static void write(float* to, Vector value) {
      reinterpret_cast<Unaligned<Isa>*>(to)->value = value;
    }
  };
  struct Stream {
    static void write(float* to, Vector value) { Isa::stream(to, value); }
  };

  static bool is_aligned(const PanelProduct& product) {
    return reinterpret_cast<uintptr_t>(product.out) % sizeof(Vector) == 0 &&
           product.out_stride % kLanes == 0;
  }

  template <class Writer>
  static void write(const PanelProduct& product, const Vector (&sums)[kRows][kVectors]) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* const to = product.out + row * product.out_stride + int64_t{v} * kLanes;
        Writer::write(to, product.alpha * sums[row][v]);
      }
    }
  }

  static void write_part(const PanelProduct& product, const Vector (&sums)[kRows][kVectors]) {
    float values[kRows][kColumns];
    __builtin_memcpy(values, sums, sizeof(values));
    for (int64_t row = 0; row < product.num_rows; ++row) {
      float* const to = product.out + row * product.out_stride;
      for (int64_t column = 0; column < product.num_columns; ++column) {
        const float value = product.alpha * values[row][column];
        to[column] = product.is_added ? to[column] + value : value;
      }
    }
  }
};

// Interleaves pairs of vectors log2(kLanes) times, which transposes kLanes of them.
template <class Isa>
struct Transpose {
  using Vector = typename Isa::Vector;
  using Mask = typename Isa::Mask;
  static constexpr int kLanes = Isa::kLanes;

  // rows[i] and rows[i + kLanes / 2] become the vectors 2 i and 2 i + 1, lane by lane.
  static void run(Vector (&rows)[kLanes]) {
    Mask low;
    Mask high;
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane / 2 + lane % 2 * kLanes;
      high[lane] = low[lane] + kLanes / 2;
    }
#pragma GCC unroll 4
    for (int stage = 1; stage < kLanes; stage *= 2) {
      Vector mixed[kLanes];
#pragma GCC unroll 8
      for (int i = 0; i < kLanes / 2; ++i) {
        mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
        mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
    }
  }
};

// A whole vector is stored for each step: what it holds past the panel's width is overwritten by
// the next step's, and the last step's lies in the room behind the panel.
template <class Isa>
void pack_transposed(const TransposedPanel& panel) {
  constexpr int kLanes = Isa::kLanes;
  for (int64_t step = 0; step < panel.depth; step += kLanes) {
    const int64_t num_steps = std::min<int64_t>(kLanes, panel.depth - step);
    for (int64_t column = 0; column < panel.panel_width; column += kLanes) {
      typename Isa::Vector rows[kLanes];
      const float* const from = panel.from + column * panel.stride + step;
      const int64_t num_rows = std::clamp<int64_t>(panel.width - column, 0, kLanes);
      if (num_rows == kLanes && num_steps == kLanes) {
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) {
          rows[row] = reinterpret_cast<const Unaligned<Isa>*>(from + row * panel.stride)->value;
        }
      } else {
        for (int row = 0; row < kLanes; ++row) {
          rows[row] = typename Isa::Vector{};
          if (row < num_rows) {
            __builtin_memcpy(&rows[row], from + row * panel.stride, num_steps * sizeof(float));
          }
        }
      }
      Transpose<Isa>::run(rows);
      float* const to = panel.to + step * panel.panel_width + column;
      for (int64_t i = 0; i < num_steps; ++i) {
        reinterpret_cast<Unaligned<Isa>*>(to + i * panel.panel_width)->value = rows[i];
      }
    }
  }
}

template <class Isa, int kVectors, int... kRows>
constexpr void set_multiply(PanelKernels& kernels, std::integer_sequence<int, kRows...> /*rows*/) {
  ((kernels.multiply[kVectors][kRows + 1] = &PanelBlock<Isa, kRows + 1, kVectors>::multiply), ...);
}

template <class Isa, int kRows, int... kVectors>
constexpr PanelKernels make_panel_kernels(std::integer_sequence<int, kVectors...> /*vectors*/) {
  PanelKernels kernels = {};
  kernels.lanes = Isa::kLanes;
  kernels.rows = kRows;
  kernels.vectors = sizeof...(kVectors);
  (set_multiply<Isa, kVectors + 1>(kernels, std::make_integer_sequence<int, kRows>()), ...);
  kernels.pack_transposed = &pack_transposed<Isa>;
  return kernels;
}

}  // namespace
}  // namespace torch_moe_ep
