#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/element_type_of.h"
#include "route/sinkhorn.h"
#include "route/sinkhorn_kernels.h"

namespace torch_moe_ep {

at::Tensor sinkhorn_cuda(const at::Tensor& logits, int64_t num_iterations) {
  check_sinkhorn(logits, num_iterations);
  TORCH_CHECK_VALUE(logits.size(1) <= kMaxSinkhornExperts,
                    "logits must have at most ",
                    kMaxSinkhornExperts,
                    " experts on CUDA, got ",
                    logits.size(1));
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor dense = logits.contiguous();
  at::Tensor plan = at::empty(dense.sizes(), logits.options().dtype(at::kFloat));
  if (plan.numel() == 0) return plan;

  SinkhornParams params = {};
  params.logits = dense.const_data_ptr();
  params.element_type = element_type_of(dense);
  params.num_tokens = dense.size(0);
  params.num_experts = static_cast<int>(dense.size(1));
  params.num_iterations = static_cast<int>(num_iterations);
  C10_CUDA_CHECK(sinkhorn_blocks(params, &params.num_blocks));
  const at::Tensor partial =
      at::empty({2, params.num_blocks, params.num_experts}, logits.options().dtype(at::kDouble));
  params.partial = partial.mutable_data_ptr<double>();
  params.plan = plan.mutable_data_ptr<float>();
  C10_CUDA_CHECK(launch_sinkhorn(params, at::cuda::getCurrentCUDAStream()));
  return plan;
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) { m.impl("sinkhorn", &sinkhorn_cuda); }

}  // namespace torch_moe_ep
