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

#include "common/copy_async.cuh"
#include "expert_mlp/sm80/ptx.cuh"

namespace torch_moe_ep::sm80 {

inline constexpr int kThreads = 256;
inline constexpr int kStepK = 64;
inline constexpr int kRowBytes = 128;
inline constexpr int kVector = 8;  // bf16 values of a 16-byte access
inline constexpr int kRowsPerPass =
    kThreads / (64 / kVector);  // rows that all threads copy at once

// What one thread copies of an operand, step after step: 16-byte column threadIdx.x % 8 of every
// kRowsPerPass-th row of the stage. Past the ends it writes zeros and reads nothing.
template <bool kIsMnMajor, int kExtent>
struct Operand {
  static constexpr int kStageBytes = kExtent * kRowBytes;
  static constexpr int kPasses = kExtent / kRowsPerPass;

  const uint8_t* source;  // the thread's next vector
  int64_t pass_bytes;     // kRowsPerPass rows of global memory
  int k_left;             // from the thread's first k to the end of K
  uint32_t pass_mask;     // bit p: the m or n of pass p exists

  // data: element (0, 0) of the expert's part; mn_begin: of the tile; mn_end, k_end: of the part.
  __device__ __forceinline__
  Operand(const __nv_bfloat16* data, int64_t pitch, int mn_begin, int mn_end, int k_end) {
    const int row = threadIdx.x / 8, column = threadIdx.x % 8 * kVector;
    const int64_t element =
        kIsMnMajor ? row * pitch + mn_begin + column : (mn_begin + row) * pitch + column;
    source = reinterpret_cast<const uint8_t*>(data + element);
    pass_bytes = kRowsPerPass * pitch * static_cast<int64_t>(sizeof(__nv_bfloat16));
    k_left = k_end - (kIsMnMajor ? row : column);
    pass_mask = 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      // MN-major: two passes of 32 k fill a chunk of 64 m or n.
      const int mn = mn_begin + (kIsMnMajor ? pass / 2 * 64 + column : row + pass * kRowsPerPass);
      if (mn < mn_end) pass_mask |= 1u << pass;
    }
  }

  // Passes [kFirst, kFirst + kCount) of the copy of the step, to be called in order.
  template <int kFirst, int kCount>
  __device__ __forceinline__ void load(uint32_t stage) {
    const int row = threadIdx.x / 8, column = threadIdx.x % 8;
    const uint32_t target = stage + row * kRowBytes + (column ^ (row & 7)) * 16;
#pragma unroll
    for (int pass = kFirst; pass < kFirst + kCount; ++pass) {
      const bool is_inside =
          (pass_mask >> pass & 1) != 0 && k_left > (kIsMnMajor ? pass % 2 * kRowsPerPass : 0);
      copy_async_16(target + pass * kRowsPerPass * kRowBytes, source, is_inside);
      // A moving pointer: one product for each pass would cost two registers each.
      source += kIsMnMajor && pass % 2 == 1 ? kRowBytes - pass_bytes : pass_bytes;
    }
    if (kFirst + kCount == kPasses) {
      source +=
          kIsMnMajor ? 2 * pass_bytes - kPasses / 2 * kRowBytes : kRowBytes - kPasses * pass_bytes;
      k_left -= kStepK;
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
