#include "expert_mlp/swiglu_loops.h"

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

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

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

TORCH_MOE_EP_CLONES
void widen_bfloat16(const uint16_t* from, float* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = float_of(static_cast<uint32_t>(from[i]) << 16);
}

// Rounds to nearest, ties to even; the carry of the addition runs into the exponent as it should.
TORCH_MOE_EP_CLONES
void narrow_bfloat16(const float* from, uint16_t* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(from[i]);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    to[i] = static_cast<uint16_t>(is_nan ? 0x7FC0 : rounded);
  }
}

// The two float16 conversions follow https://github.com/Maratyszcza/FP16: no branches, and right
// also when the CPU flushes subnormals to zero.
TORCH_MOE_EP_CLONES
void widen_float16(const uint16_t* from, float* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    const uint32_t magnitude = bits + bits;  // without the sign
    // The exponent moves up by 224 so that infinity and NaN stay such, then down by 112.
    const float normal = float_of((magnitude >> 4) + (0xE0U << 23)) * 0x1p-112F;
    const float subnormal = float_of((magnitude >> 17) | (126U << 23)) - 0.5F;
    const uint32_t unsigned_bits = bits_of(magnitude < (1U << 27) ? subnormal : normal);
    to[i] = float_of((bits & 0x80000000U) | unsigned_bits);
  }
}

TORCH_MOE_EP_CLONES
void narrow_float16(const float* from, uint16_t* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(from[i]);
    const uint32_t magnitude = bits + bits;
    // What float16 cannot hold becomes infinity by the first factor and stays it by the second.
    const float scaled = (fabsf(from[i]) * 0x1p+112F) * 0x1p-110F;
    // Adding a power of two of the right size lets the FPU round at float16's last bit.
    const uint32_t exponent = magnitude & 0xFF000000U;
    const uint32_t bias = exponent < 0x71000000U ? 0x71000000U : exponent;
    const uint32_t rounded = bits_of(float_of((bias >> 1) + 0x07800000U) + scaled);
    const uint32_t finite = ((rounded >> 13) & 0x7C00U) + (rounded & 0x0FFFU);
    const uint32_t unsigned_half = magnitude > 0xFF000000U ? 0x7E00U : finite;
    to[i] = static_cast<uint16_t>((bits >> 16 & 0x8000U) | unsigned_half);
  }
}

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

template <void (*kWiden)(const uint16_t*, float*, int64_t),
          void (*kNarrow)(const float*, uint16_t*, int64_t)>
struct Half {
  using Element = uint16_t;
  static const float* read(const uint16_t* from, float* buffer, int64_t count) {
    kWiden(from, buffer, count);
    return buffer;
  }
  static float* target(uint16_t* /*to*/, float* buffer) { return buffer; }
  static void write(const float* from, uint16_t* to, int64_t count) { kNarrow(from, to, count); }
};

using BFloat16 = Half<widen_bfloat16, narrow_bfloat16>;
using Float16 = Half<widen_float16, narrow_float16>;

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
