// One operand of a CTA's tile: from global memory into a swizzled stage, from there into mma
// fragments.
//
// A stage is kExtent rows of 128 bytes in both layouts, 16-byte columns permuted by (row % 8) so
// that neither the copies nor ldmatrix meet bank conflicts:
//   K-major:  row = m or n, columns = 64 k
//   MN-major: row = (chunk of 64 m or n) * 64 + k, columns = the chunk
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "expert_mlp/sm80/ptx.cuh"

namespace torch_moe_ep::sm80 {

inline constexpr int kThreads = 256;
inline constexpr int kStepK = 64;
inline constexpr int kRowBytes = 128;
inline constexpr int kVector = 8;  // bf16 values of a 16-byte access
inline constexpr int kRowsPerPass =
    kThreads / (64 / kVector);  // rows that all threads copy at once

template <bool kIsMnMajor, int kExtent>
struct Operand {
  static constexpr int kStageBytes = kExtent * kRowBytes;

  const __nv_bfloat16* data;  // element (0, 0) of the expert's part
  int64_t pitch;
  int mn_begin;  // of the tile
  int mn_end;    // of the expert's part: zeros from here on
  int k_end;     // likewise

  __device__ __forceinline__ void load(uint32_t stage, int k_begin) const {
    const int row = threadIdx.x / 8, column = threadIdx.x % 8;
    const uint32_t target = stage + row * kRowBytes + (column ^ (row & 7)) * 16;
#pragma unroll
    for (int pass = 0; pass < kExtent / kRowsPerPass; ++pass) {
      // MN-major: two passes of 32 k fill a chunk.
      const int k = k_begin + (kIsMnMajor ? row + pass % 2 * kRowsPerPass : column * kVector);
      const int mn =
          mn_begin + (kIsMnMajor ? pass / 2 * 64 + column * kVector : row + pass * kRowsPerPass);
      const bool is_inside = k < k_end && mn < mn_end;
      const int64_t element = kIsMnMajor ? k * pitch + mn : mn * pitch + k;
      copy_async_16(target + pass * kRowsPerPass * kRowBytes, is_inside ? data + element : data,
                    is_inside);
    }
  }
};

// Address that a lane gives to ldmatrix.x4 for the 16 (m or n) x 16 (k) block at (mn, 16 k16).
// kKFirst: matrices 0, 1 differ in k and 2, 3 follow 8 m or n later (fragment of B); else the other
// way round (fragment of A).
template <bool kIsMnMajor, bool kKFirst>
__device__ __forceinline__ uint32_t fragment_address(uint32_t stage, int mn, int k16) {
  const int lane = threadIdx.x % 32;
  const int matrix = lane / 8, row_in_matrix = lane % 8;
  const int k8 = kKFirst ? matrix % 2 : matrix / 2;
  const int mn8 = kKFirst ? matrix / 2 : matrix % 2;
  const int row =
      kIsMnMajor ? mn / 64 * 64 + k16 * 16 + k8 * 8 + row_in_matrix : mn + mn8 * 8 + row_in_matrix;
  const int column = kIsMnMajor ? mn % 64 / 8 + mn8 : k16 * 2 + k8;
  return stage + row * kRowBytes + (column ^ row_in_matrix) * 16;
}

}  // namespace torch_moe_ep::sm80
