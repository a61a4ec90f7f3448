// The grouped expert GEMMs on tensors: picks kernels (gemm_choice.h) and launches them on the
// current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <vector>

#include "expert_mlp/expert_segments.h"
#include "expert_mlp/gemm_choice.h"

namespace torch_moe_ep {

// The GEMMs of one set of expert segments. All tensors are contiguous, of one dtype, on the device
// of the offsets. Letters as in grouped_gemm.h. Rows that no expert has are left unwritten
// in given tensors.
//
// Host sync: none with the hand-written kernels and, where experts have all rows, with torch's
// _grouped_mm. The loop over experts (float32, float16, odd sizes; segments of one chunk where
// torch's kernels are asked for) needs host_offsets; when those are empty it copies the offsets to
// the host once for the object's life, which waits for the stream.
class ExpertGemms {
 public:
  explicit ExpertGemms(ExpertSegments segments);

  // See GroupedGemmParams.
  void limit_shared_bytes(int bytes) { max_shared_bytes_ = bytes; }

  // Results go into the tensors given, or into new ones where these are undefined.

  // rows [R, K], weights [L, N, K] -> [R, N].
  at::Tensor nt(const at::Tensor& rows, const at::Tensor& weights, const at::Tensor& into = {});
  // rows [R, K], weights [L, K, N] -> [R, N].
  at::Tensor nn(const at::Tensor& rows, const at::Tensor& weights, const at::Tensor& into = {});
  // rows_a [R, M], rows_b [R, N] -> alpha * [L, M, N]; zeros for an expert without rows.
  at::Tensor tn(const at::Tensor& rows_a, const at::Tensor& rows_b, double alpha);

  // sum += tn(rows_a, rows_b, alpha); sum is fp32 [L, M, N], contiguous.
  void tn_add(const at::Tensor& rows_a,
              const at::Tensor& rows_b,
              double alpha,
              const at::Tensor& sum);

  struct GateUp {
    at::Tensor z;           // [R, 2I]
    at::Tensor activation;  // [R, I]
  };
  // nt followed by SwiGLU times row weight, in one kernel where the kernels chosen have it.
  GateUp nt_swiglu(const at::Tensor& rows,
                   const at::Tensor& weights,
                   const at::Tensor& row_weights,
                   GateUp into = {});

  struct SwigluGradients {
    at::Tensor activation;  // [R, I] times row weight, as nt_swiglu had it
    at::Tensor grad_z;      // [R, 2I]
  };
  // nn, which gives the gradient of the activation, followed by the gradients of SwiGLU and of the
  // row weights; in one kernel where the kernels chosen have it and it is worth it, or as
  // `is_fused` says (and a small one that adds up the row weights' over the tiles). z is [R, 2I];
  // grad_row_weights [R] fp32 is written for the owned rows.
  SwigluGradients nn_swiglu_backward(const at::Tensor& grad_rows,
                                     const at::Tensor& weights,
                                     const at::Tensor& z,
                                     const at::Tensor& row_weights,
                                     const at::Tensor& grad_row_weights,
                                     SwigluGradients into = {},
                                     std::optional<bool> is_fused = {});

 private:
  RowSegments on_device() const;
  RowSegments on_host();
  GroupedGemmShape shape_of(GemmLayout layout, const at::Tensor& a, const at::Tensor& b) const;
  GroupedGemmParams params_of(const GroupedGemmShape& shape,
                              const at::Tensor& a,
                              const at::Tensor& b,
                              const at::Tensor& out) const;
  at::Tensor rows_times_weights(GemmLayout layout,
                                const at::Tensor& rows,
                                const at::Tensor& weights,
                                at::Tensor out);
  void multiply_one_by_one(const at::Tensor& rows, const at::Tensor& right, const at::Tensor& out);
  void launch(GemmKernels kernels, GroupedGemmParams params);
  const at::Tensor& segment_ends();

  ExpertSegments segments_;
  at::Tensor segment_ends_;  // int32 [L] on the device, made when first used
  // One for each launch of the sm_90a kernels: the next tile to be handed out.
  at::Tensor tile_counters_;  // int32, zeros
  int64_t num_used_counters_ = 0;
  int max_shared_bytes_ = std::numeric_limits<int>::max();
};

}  // namespace torch_moe_ep
