// Grouped bf16 GEMMs over an expert-ordered buffer of rows: the contract that the sm_90a and the
// generic kernels share. No torch here, raw device pointers only.
//
// Letters: R rows of the buffer (host-known bound), L local experts. Expert l has the rows
// [segments.begin(l), segments.end(l)); offsets are read on the device, never by the host. Every
// offset is a multiple of kRowAlignment and the first is 0; the padding rows at a segment's end are
// finite (written zeros). Rows that no expert has, between segments or behind the last, are neither
// written nor do they reach a result, whatever they hold.
//
//   layout  a         b           out          out =
//   NT      [R, K]    [L, N, K]   [R, N]       a[r] b[l]^T      (forward)
//   NN      [R, K]    [L, K, N]   [R, N]       a[r] b[l]        (gradient of the rows)
//   TN      [R, M]    [R, N]      [L, M, N]    alpha * sum over r of expert l of a[r]^T b[r]
//                                              (gradient of the weight; zeros for an empty expert)
//
// All tensors are contiguous bf16 (out of kAccumulate: fp32), accumulation is fp32 with one
// rounding at the end. Results are bit-equal from run to run. Nothing synchronises the host; a
// launch can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>

#include "expert_mlp/row_segments.h"

namespace torch_moe_ep {

inline constexpr int kRowAlignment = 128;
inline constexpr int kMaxLocalExperts = 512;

enum class GemmLayout { kNT, kNN, kTN };

// What becomes of the fp32 sums besides being rounded into `out`. With z = [gate, up] of a row,
// h = silu(gate) * up and w its row weight:
enum class GemmEpilogue {
  kPlain,
  kSwiglu,          // NT; sums are z, columns = 2I, gate first: also activation = w h
  kSwigluBackward,  // NN; sums are d activation, columns = I: out [R, 2I] is the gradient of z,
                    // activation = w h again, and partial_dots the gradient of w
  kAccumulate,      // TN; out is fp32 and the sums are added to what it holds
};

struct GroupedGemmShape {
  GemmLayout layout;
  int64_t num_experts;                           // L
  int64_t rows;                                  // R
  int64_t columns;                               // N, columns of out
  int64_t a_columns;                             // K of NT and NN, M of TN
  GemmEpilogue epilogue = GemmEpilogue::kPlain;  // sm_90a alone
  int64_t num_parts = 1;  // parts that the R rows are split in, about equal; one of them is taken

  int64_t rows_per_expert() const { return num_experts > 0 ? rows / (num_experts * num_parts) : 0; }
};

struct GroupedGemmParams {
  GroupedGemmShape shape;
  const void* a;
  const void* b;
  void* out;
  RowSegments segments;      // offsets: device
  float alpha = 1.0f;        // TN alone
  int* next_tile = nullptr;  // sm_90a: device, zero when the kernel starts; left at any value
  // sm80: of a CTA. Fewer than the device has: the tile of devices that have no more, for tests.
  int max_shared_bytes = std::numeric_limits<int>::max();

  // kSwiglu, kSwigluBackward
  void* activation = nullptr;          // bf16 [R, I]
  const float* row_weights = nullptr;  // device, [R]
  // kSwigluBackward
  const void* z = nullptr;        // bf16 [R, 2I]
  float* partial_dots = nullptr;  // [num_column_tiles, R]: d activation * h summed over the columns
                                  // of one tile; the rows that an expert owns are written
};

namespace sm90 {

// Why the sm_90a kernels do not take this shape (a sentence for the user), or nullptr if they do.
// Pure: looks at no device. Pointers must be 16-byte aligned besides.
const char* refusal(const GroupedGemmShape& shape);
inline bool is_supported(const GroupedGemmShape& shape) { return refusal(shape) == nullptr; }

// Whether kSwigluBackward is worth it for this shape of layout NN: else kPlain and a kernel of its
// own are faster. Pure.
bool fuses_swiglu_backward(const GroupedGemmShape& shape);

// Tiles that the result's columns are cut into: the first size of partial_dots. Pure.
int64_t num_column_tiles(const GroupedGemmShape& shape);

// Needs a device of compute capability 9.0 and a shape that is supported (else
// cudaErrorInvalidValue). rows == 0 launches nothing for NT and NN and writes zeros for TN.
cudaError_t grouped_gemm(const GroupedGemmParams& params, cudaStream_t stream);

}  // namespace sm90

namespace sm80 {

// The same contract for every device of compute capability 8.0 or later (mma.sync, cp.async).
const char* refusal(const GroupedGemmShape& shape);
inline bool is_supported(const GroupedGemmShape& shape) { return refusal(shape) == nullptr; }
cudaError_t grouped_gemm(const GroupedGemmParams& params, cudaStream_t stream);

}  // namespace sm80
}  // namespace torch_moe_ep
