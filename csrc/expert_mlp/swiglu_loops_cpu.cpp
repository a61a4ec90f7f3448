#include "expert_mlp/swiglu_loops.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <math.h>

#include <algorithm>
#include <cstdint>

// One body, compiled for each of these instruction sets; the loader picks. glibc's libmvec has a
// vector expf for each (4 ulp), which math.h declares under -ffast-math alone: that would also let
// g++ reorder sums and forget NaN. What vector code needs of it is that expf need not set errno and
// that comparisons need not trap. Elsewhere the loops are plain.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#pragma omp declare simd notinbranch
extern "C" float expf(float) noexcept;
#define TORCH_MOE_EP_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TORCH_MOE_EP_CLONES
#endif

namespace torch_moe_ep {
namespace {

// Elements that are worked on at a time: six fp32 buffers of so many stay inside 32 KiB of L1.
constexpr int64_t kTile = 1024;

TORCH_MOE_EP_CLONES
void swiglu_tile(
    const float* gate, const float* up, float weight, float* activation, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float silu = gate[i] / (1.0F + ::expf(-gate[i]));
    activation[i] = weight * (silu * up[i]);
  }
}

struct GradientTile {
  const float* gate;
  const float* up;
  float weight;
  const float* grad_activation;
  float* activation;  // may be grad_activation
  float* grad_gate;   // may be gate
  float* grad_up;     // may be up
  int64_t count;
};

// With s = sigmoid(gate): d silu(gate) / d gate = s (1 + gate (1 - s)). Returns the tile's part of
// the row weight's gradient.
TORCH_MOE_EP_CLONES
float swiglu_gradient_tile(const GradientTile& tile) {
  const GradientTile t = tile;
  float sum = 0.0F;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < t.count; ++i) {
    const float gate = t.gate[i];
    const float up = t.up[i];
    const float grad = t.grad_activation[i];
    const float sigmoid = 1.0F / (1.0F + ::expf(-gate));
    const float silu = gate * sigmoid;
    const float hidden = silu * up;
    const float grad_hidden = grad * t.weight;
    sum += grad * hidden;
    t.activation[i] = t.weight * hidden;
    t.grad_gate[i] = grad_hidden * up * (sigmoid * (1.0F + gate * (1.0F - sigmoid)));
    t.grad_up[i] = grad_hidden * silu;
  }
  return sum;
}

// How a tile of each element type is read and written. fp32 tiles are worked on where they lie.
struct Float32 {
  using Element = float;
  static const float* read(const float* from, float* /*buffer*/, int64_t /*count*/) { return from; }
  static float* target(float* to, float* /*buffer*/) { return to; }
  static void write(const float* /*from*/, float* /*to*/, int64_t /*count*/) {}
};

template <class T>
struct Half {
  using Element = T;
  static const float* read(const T* from, float* buffer, int64_t count) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<float>(from[i]);
    return buffer;
  }
  static float* target(T* /*to*/, float* buffer) { return buffer; }
  static void write(const float* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  }
};

using BFloat16 = Half<c10::BFloat16>;
using Float16 = Half<c10::Half>;

template <class Type>
void forward_rows(const SwigluRows& rows, int64_t first, int64_t last) {
  using Element = typename Type::Element;
  alignas(64) float gate_buffer[kTile];
  alignas(64) float up_buffer[kTile];
  alignas(64) float activation_buffer[kTile];
  for (int64_t row = first; row < last; ++row) {
    const Element* gate = static_cast<const Element*>(rows.z) + row * 2 * rows.width;
    const Element* up = gate + rows.width;
    Element* activation = static_cast<Element*>(rows.activation) + row * rows.width;
    for (int64_t i = 0; i < rows.width; i += kTile) {
      const int64_t count = std::min(kTile, rows.width - i);
      float* result = Type::target(activation + i, activation_buffer);
      swiglu_tile(Type::read(gate + i, gate_buffer, count),
                  Type::read(up + i, up_buffer, count),
                  rows.row_weights[row],
                  result,
                  count);
      Type::write(result, activation + i, count);
    }
  }
}

template <class Type>
void gradient_rows(const SwigluGradientRows& rows, int64_t first, int64_t last) {
  using Element = typename Type::Element;
  const int64_t width = rows.forward.width;
  alignas(64) float gate_buffer[kTile];
  alignas(64) float up_buffer[kTile];
  alignas(64) float activation_buffer[kTile];
  for (int64_t row = first; row < last; ++row) {
    const Element* gate = static_cast<const Element*>(rows.forward.z) + row * 2 * width;
    const Element* grad = static_cast<const Element*>(rows.grad_activation) + row * width;
    Element* activation = static_cast<Element*>(rows.forward.activation) + row * width;
    Element* grad_gate = static_cast<Element*>(rows.grad_z) + row * 2 * width;
    Element* grad_up = grad_gate + width;
    float sum = 0.0F;
    for (int64_t i = 0; i < width; i += kTile) {
      const int64_t count = std::min(kTile, width - i);
      const GradientTile tile = {
          Type::read(gate + i, gate_buffer, count),
          Type::read(gate + width + i, up_buffer, count),
          rows.forward.row_weights[row],
          Type::read(grad + i, activation_buffer, count),
          Type::target(activation + i, activation_buffer),
          Type::target(grad_gate + i, gate_buffer),
          Type::target(grad_up + i, up_buffer),
          count,
      };
      sum += swiglu_gradient_tile(tile);
      Type::write(tile.activation, activation + i, count);
      Type::write(tile.grad_gate, grad_gate + i, count);
      Type::write(tile.grad_up, grad_up + i, count);
    }
    rows.grad_row_weights[row] = sum;
  }
}

}  // namespace

void swiglu_rows(const SwigluRows& rows, int64_t first, int64_t last) {
  switch (rows.element_type) {
    case ElementType::kFloat32:
      return forward_rows<Float32>(rows, first, last);
    case ElementType::kBFloat16:
      return forward_rows<BFloat16>(rows, first, last);
    case ElementType::kFloat16:
      return forward_rows<Float16>(rows, first, last);
  }
}

void swiglu_gradient_rows(const SwigluGradientRows& rows, int64_t first, int64_t last) {
  switch (rows.forward.element_type) {
    case ElementType::kFloat32:
      return gradient_rows<Float32>(rows, first, last);
    case ElementType::kBFloat16:
      return gradient_rows<BFloat16>(rows, first, last);
    case ElementType::kFloat16:
      return gradient_rows<Float16>(rows, first, last);
  }
}

}  // namespace torch_moe_ep
