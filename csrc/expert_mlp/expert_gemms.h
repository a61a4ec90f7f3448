// The grouped expert GEMMs on tensors: picks kernels (gemm_choice.h) and launches them on the
// current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "expert_mlp/gemm_choice.h"

namespace torch_moe_ep {

// The GEMMs of one set of expert segments. All tensors are contiguous, of one dtype, on the device
// of expert_offsets. Letters as in grouped_gemm.h.
//
// Host sync: none with the hand-written kernels and with torch's _grouped_mm. The loop over experts
// (float32, float16, odd sizes) needs host_offsets; when those are empty it copies expert_offsets
// to the host once for the object's life, which waits for the stream.
class ExpertGemms {
 public:
  // expert_offsets int64 [L + 1] on the device; host_offsets int64 [L + 1] on the CPU, or empty.
  ExpertGemms(at::Tensor expert_offsets, at::Tensor host_offsets);

  // rows [R, K], weights [L, N, K] -> [R, N]; rows past the last segment are left unwritten.
  at::Tensor nt(const at::Tensor& rows, const at::Tensor& weights);
  // rows [R, K], weights [L, K, N] -> [R, N]; likewise.
  at::Tensor nn(const at::Tensor& rows, const at::Tensor& weights);
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
                   const at::Tensor& row_weights);

  struct SwigluGradients {
    at::Tensor activation;  // [R, I] times row weight, as nt_swiglu had it
    at::Tensor grad_z;      // [R, 2I]
  };
  // nn, which gives the gradient of the activation, followed by the gradients of SwiGLU and of the
  // row weights; in one kernel where the kernels chosen have it (and a small one that adds up the
  // row weights' over the tiles). z is [R, 2I]; grad_row_weights [R] fp32 is written for the owned
  // rows.
  SwigluGradients nn_swiglu_backward(const at::Tensor& grad_rows,
                                     const at::Tensor& weights,
                                     const at::Tensor& z,
                                     const at::Tensor& row_weights,
                                     const at::Tensor& grad_row_weights);

 private:
  const int64_t* num_rows() const;  // device, one number: the rows that experts own
  GemmKernels choose(const GroupedGemmShape& shape, const at::Tensor& a, const at::Tensor& b) const;
  at::Tensor rows_times_weights(GemmLayout layout,
                                const at::Tensor& rows,
                                const at::Tensor& weights);
  const at::Tensor& segment_ends();
  const std::vector<int64_t>& host_offsets();

  at::Tensor expert_offsets_;
  at::Tensor given_host_offsets_;
  at::Tensor segment_ends_;  // int32 [L] on the device, made when first used
  std::vector<int64_t> host_offsets_;
};

}  // namespace torch_moe_ep
