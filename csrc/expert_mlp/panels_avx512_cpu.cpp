#include "expert_mlp/panels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <algorithm>
#include <utility>

#pragma GCC target("avx512f")
#include "expert_mlp/panel_product.h"

namespace torch_moe_ep {
namespace {

struct Avx512 {
  typedef float Vector __attribute__((vector_size(64)));
  typedef int Mask __attribute__((vector_size(64)));
  static constexpr int kLanes = 16;
  static void stream(float* to, Vector value) { _mm512_stream_ps(to, value); }
};

constexpr PanelKernels kKernels =
    make_panel_kernels<Avx512, 8>(std::make_integer_sequence<int, 3>());

}  // namespace

const PanelKernels* avx512_panel_kernels() { return &kKernels; }

}  // namespace torch_moe_ep

#else

namespace torch_moe_ep {

const PanelKernels* avx512_panel_kernels() { return nullptr; }

}  // namespace torch_moe_ep

#endif
