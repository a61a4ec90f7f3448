#include "expert_mlp/panel_gemm.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>

#include "expert_mlp/panels.h"

namespace torch_moe_ep {
namespace {

// Steps of depth whose panels are packed together.
constexpr int64_t kDepth = 768;
// Panels that a thread packs together: with what is asked for ahead, half of a 1 MiB L2.
constexpr int64_t kGroupElements = int64_t{192} * 1024 / sizeof(float);
// Multiply-adds that pay for waking a thread.
constexpr int64_t kTaskWork = int64_t{1} << 18;
constexpr int64_t kAlignment = 64 / sizeof(float);

const PanelKernels* panel_kernels() {
  static const PanelKernels* const kernels = find_panel_kernels(at::get_cpu_capability());
  return kernels;
}

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// A row of a panel is too short to pay for a call of memmove.
void copy_steps(const float* from,
                int64_t stride,
                int64_t depth,
                int64_t width,
                int64_t panel_width,
                float* to) {
  constexpr int64_t kCopied = 8;
  for (int64_t step = 0; step < depth; ++step, from += stride, to += panel_width) {
    int64_t i = 0;
    for (; i + kCopied <= width; i += kCopied)
      std::memcpy(to + i, from + i, kCopied * sizeof(float));
    for (; i < width; ++i) to[i] = from[i];
    for (; i < panel_width; ++i) to[i] = 0.0F;
  }
}

// One operand, cut into panels along M or N.
struct Operand {
  const float* data;
  int64_t stride;  // elements
  bool
      is_depth_strided;  // element i of a step lies beside element i + 1; else beside the next step
  int64_t count;         // M or N
  int64_t max_width;     // of a panel
  int64_t width_unit;    // a panel's width is a multiple

  int64_t num_panels() const { return ceil_div(count, max_width); }
  int64_t begin(int64_t panel) const { return panel * max_width; }
  // Rows or columns that a panel has.
  int64_t width(int64_t panel) const { return std::min(max_width, count - begin(panel)); }
  int64_t panel_width(int64_t panel) const {
    return ceil_div(width(panel), width_unit) * width_unit;
  }
  // A transposing pack writes up to a vector further.
  int64_t panel_size(int64_t depth) const {
    return ceil_div(depth * max_width, kAlignment) * kAlignment + kAlignment;
  }

  // Part `part` of `num_parts` of the cache lines that a panel is packed from.
  Prefetch prefetch(
      int64_t panel, int64_t first, int64_t depth, int64_t part, int64_t num_parts) const {
    constexpr int64_t kLine = 64 / sizeof(float);
    if (panel >= num_panels()) return {};
    const float* const from = is_depth_strided ? data + first * stride + begin(panel)
                                               : data + begin(panel) * stride + first;
    const int64_t lines_per_row = ceil_div(is_depth_strided ? width(panel) : depth, kLine);
    const int64_t num_lines = lines_per_row * (is_depth_strided ? depth : width(panel));
    const int64_t line = num_lines * part / num_parts;
    const int64_t end = num_lines * (part + 1) / num_parts;
    return {reinterpret_cast<const char*>(from + line / lines_per_row * stride),
            stride * static_cast<int64_t>(sizeof(float)),
            lines_per_row,
            line % lines_per_row,
            end - line};
  }

  void pack(
      const PanelKernels& kernels, int64_t panel, int64_t first, int64_t depth, float* to) const {
    const int64_t at = begin(panel);
    if (is_depth_strided) {
      copy_steps(data + first * stride + at, stride, depth, width(panel), panel_width(panel), to);
    } else {
      kernels.pack_transposed(
          {data + at * stride + first, stride, depth, width(panel), panel_width(panel), to});
    }
  }
};

struct Output {
  float* data;
  int64_t stride;
  float alpha;
  bool is_added;
  bool is_streamed;
};

// Steps [first, first + depth) of the product. Of the two operands the one with fewer rows or
// columns is packed whole, by all threads; each thread packs its own part of the other.
struct DepthBlock {
  const PanelKernels& kernels;
  const Operand& left;
  const Operand& right;
  const Output& out;
  int64_t first;
  int64_t depth;
  float* shared_panels;
  float* own_panels;  // kGroupElements, or one panel, for each thread

  bool is_left_shared() const { return left.count <= right.count; }
  const Operand& shared() const { return is_left_shared() ? left : right; }
  const Operand& own() const { return is_left_shared() ? right : left; }

  void multiply(int64_t left_panel,
                const float* packed_left,
                int64_t right_panel,
                const float* packed_right,
                const Prefetch& prefetch) const {
    const int64_t row = left.begin(left_panel);
    const int64_t column = right.begin(right_panel);
    const int64_t vectors = right.panel_width(right_panel) / kernels.lanes;
    kernels.multiply[vectors][left.panel_width(left_panel)](
        {.left = packed_left,
         .right = packed_right,
         .depth = depth,
         .alpha = out.alpha,
         .is_added = out.is_added || first > 0,
         .is_streamed = out.is_streamed,
         .out = out.data + row * out.stride + column,
         .out_stride = out.stride,
         .num_rows = left.width(left_panel),
         .num_columns = right.width(right_panel),
         .prefetch = prefetch});
  }

  // `count` own panels from `begin` on, packed one behind the other, with every shared one.
  void multiply_group(int64_t begin, int64_t count, const float* packed) const {
    const int64_t own_size = own().panel_size(depth);
    const int64_t shared_size = shared().panel_size(depth);
    for (int64_t s = 0; s < shared().num_panels(); ++s) {
      const float* const packed_shared = shared_panels + s * shared_size;
      for (int64_t i = 0; i < count; ++i) {
        const float* const packed_own = packed + i * own_size;
        const Prefetch next =
            own().prefetch(begin + count + i, first, depth, s, shared().num_panels());
        if (is_left_shared()) {
          multiply(s, packed_shared, begin + i, packed_own, next);
        } else {
          multiply(begin + i, packed_own, s, packed_shared, next);
        }
      }
    }
  }

  void own_range(int64_t begin, int64_t end) const {
    const int64_t size = own().panel_size(depth);
    const int64_t group = std::max<int64_t>(1, kGroupElements / size);
    float* const packed = own_panels + at::get_thread_num() * std::max(kGroupElements, size);
    for (int64_t panel = begin; panel < end; panel += group) {
      const int64_t count = std::min(group, end - panel);
      for (int64_t i = 0; i < count; ++i) {
        own().pack(kernels, panel + i, first, depth, packed + i * size);
      }
      multiply_group(panel, count, packed);
    }
    // Stores past the caches are ordered by a full fence alone, not by what ends a parallel loop.
    if (out.is_streamed) std::atomic_thread_fence(std::memory_order_seq_cst);
  }

  void run() const {
    const int64_t shared_work = shared().max_width * depth;
    at::parallel_for(0,
                     shared().num_panels(),
                     ceil_div(kTaskWork / 8, shared_work),
                     [this](int64_t begin, int64_t end) {
                       const int64_t size = shared().panel_size(depth);
                       for (int64_t panel = begin; panel < end; ++panel) {
                         shared().pack(kernels, panel, first, depth, shared_panels + panel * size);
                       }
                     });
    const int64_t own_work = own().max_width * shared().count * depth;
    at::parallel_for(
        0, own().num_panels(), ceil_div(kTaskWork, own_work), [this](int64_t begin, int64_t end) {
          own_range(begin, end);
        });
  }
};

// Panels of at most max_width that share the rows evenly: 20 rows as 3 of 7, not 8, 8 and 4.
int64_t even_width(int64_t count, int64_t max_width) {
  return ceil_div(count, ceil_div(count, max_width));
}

// The matrix cut along its first dimension (left, or right transposed).
Operand operand_of(const at::Tensor& matrix, int64_t max_width, int64_t width_unit) {
  const bool is_depth_strided = matrix.stride(0) == 1 && matrix.stride(1) != 1;
  return {matrix.const_data_ptr<float>(),
          matrix.stride(is_depth_strided ? 1 : 0),
          is_depth_strided,
          matrix.size(0),
          max_width,
          width_unit};
}

at::Tensor with_a_unit_stride(const at::Tensor& matrix) {
  return matrix.stride(0) == 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

void multiply_panels(const PanelKernels& kernels,
                     const at::Tensor& left_matrix,
                     const at::Tensor& right_matrix,
                     const Output& out) {
  const int64_t total_depth = left_matrix.size(1);
  const Operand left = operand_of(left_matrix, even_width(left_matrix.size(0), kernels.rows), 1);
  const Operand right =
      operand_of(right_matrix.t(), kernels.vectors * kernels.lanes, kernels.lanes);
  const DepthBlock layout{kernels, left, right, out, 0, std::min(total_depth, kDepth), {}, {}};
  const int64_t shared_size =
      layout.shared().num_panels() * layout.shared().panel_size(layout.depth);
  const int64_t own_size = std::max(kGroupElements, layout.own().panel_size(layout.depth));
  const at::Tensor panels =
      at::empty({shared_size + at::get_num_threads() * own_size}, left_matrix.options());
  float* const shared_panels = panels.mutable_data_ptr<float>();
  for (int64_t first = 0; first < total_depth; first += kDepth) {
    const int64_t depth = std::min(kDepth, total_depth - first);
    DepthBlock{kernels, left, right, out, first, depth, shared_panels, shared_panels + shared_size}
        .run();
  }
}

}  // namespace

const PanelKernels* find_panel_kernels(const std::string& cpu_capability) {
  if (cpu_capability == "AVX512") return avx512_panel_kernels();
  if (cpu_capability == "AVX2") return avx2_panel_kernels();
  return nullptr;
}

void multiply(const at::Tensor& out,
              const at::Tensor& left,
              const at::Tensor& right,
              double alpha,
              double beta,
              Destination destination) {
  const bool has_panels = out.scalar_type() == at::kFloat && panel_kernels() != nullptr &&
                          out.stride(1) == 1 && left.size(1) > 0 && out.numel() > 0;
  if (!has_panels) {
    at::Tensor result = out;
    at::addmm_out(result, out, left, right, beta, alpha);
    return;
  }
  multiply_panels(*panel_kernels(),
                  with_a_unit_stride(left),
                  with_a_unit_stride(right),
                  {.data = out.mutable_data_ptr<float>(),
                   .stride = out.stride(0),
                   .alpha = static_cast<float>(alpha),
                   .is_added = beta != 0.0,
                   .is_streamed = destination == Destination::kReadLater &&
                                  left.size(1) <= kDepth && beta == 0.0});
}

}  // namespace torch_moe_ep
