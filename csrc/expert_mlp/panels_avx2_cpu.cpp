#include "expert_mlp/panels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <algorithm>
#include <utility>

#pragma GCC target("avx2,fma")
#include "expert_mlp/panel_product.h"

namespace torch_moe_ep {
namespace {

struct Avx2 {
  typedef float Vector __attribute__((vector_size(32)));
  typedef int Mask __attribute__((vector_size(32)));
  static constexpr int kLanes = 8;
  static void stream(float* to, Vector value) { _mm256_stream_ps(to, value); }
};

constexpr PanelKernels kKernels = make_panel_kernels<Avx2, 6>(std::make_integer_sequence<int, 2>());

}  // namespace

const PanelKernels* avx2_panel_kernels() { return &kKernels; }

}  // namespace torch_moe_ep

#else

namespace torch_moe_ep {

const PanelKernels* avx2_panel_kernels() { return nullptr; }

}  // namespace torch_moe_ep

#endif
