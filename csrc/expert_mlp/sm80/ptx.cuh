// Ampere instructions that CUDA C++ has no words for: ldmatrix, mma.sync.
#pragma once

#include <cstdint>

namespace torch_moe_ep::sm80 {

// Four 8x8 bf16 matrices; lane l gives the address of row l % 8 of matrix l / 8.
template <bool kTranspose>
__device__ __forceinline__ void load_matrix_x4(uint32_t (&words)[4], uint32_t shared) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared));
  }
}

// acc [16, 8] += a [16, 16] b [16, 8]
__device__ __forceinline__ void multiply_16x8x16(float (&acc)[4],
                                                 const uint32_t (&a)[4],
                                                 uint32_t b0,
                                                 uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace torch_moe_ep::sm80
