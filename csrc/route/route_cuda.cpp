#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "common/element_type_of.h"
#include "route/route.h"
#include "route/route_kernels.h"

namespace torch_moe_ep {
namespace {

void check_sizes(int64_t num_experts, int64_t top_k) {
  TORCH_CHECK_VALUE(num_experts <= kMaxRoutedExperts,
                    "logits must have at most ",
                    kMaxRoutedExperts,
                    " experts on CUDA, got ",
                    num_experts);
  TORCH_CHECK_VALUE(
      top_k <= kMaxRoutedTopK, "top_k must be at most ", kMaxRoutedTopK, " on CUDA, got ", top_k);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> route_cuda(const at::Tensor& logits,
                                              int64_t top_k,
                                              bool normalize) {
  check_route(logits, top_k);
  const ElementType element_type = element_type_of(logits);
  const int64_t num_tokens = logits.size(0);
  const int64_t num_experts = logits.size(1);
  check_sizes(num_experts, top_k);

  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor dense_logits = logits.contiguous();
  at::Tensor weights = at::empty({num_tokens, top_k}, logits.options().dtype(at::kFloat));
  at::Tensor expert_ids = at::empty({num_tokens, top_k}, logits.options().dtype(at::kLong));

  RouteParams params = {};
  params.logits = dense_logits.const_data_ptr();
  params.element_type = element_type;
  params.num_tokens = num_tokens;
  params.num_experts = static_cast<int>(num_experts);
  params.top_k = static_cast<int>(top_k);
  params.normalize = normalize;
  params.weights = weights.mutable_data_ptr<float>();
  params.expert_ids = expert_ids.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(launch_route(params, at::cuda::getCurrentCUDAStream()));
  return {weights, expert_ids};
}

at::Tensor route_backward_cuda(const at::Tensor& grad_weights,
                               const at::Tensor& logits,
                               const at::Tensor& weights,
                               const at::Tensor& expert_ids,
                               bool normalize) {
  check_route_backward(grad_weights, logits, weights, expert_ids);
  const ElementType element_type = element_type_of(logits);
  const int64_t top_k = expert_ids.size(1);
  check_sizes(logits.size(1), top_k);

  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor dense_grads = grad_weights.contiguous();
  const at::Tensor dense_logits = logits.contiguous();
  const at::Tensor dense_weights = weights.contiguous();
  const at::Tensor dense_ids = expert_ids.contiguous();
  at::Tensor grad_logits = at::empty(dense_logits.sizes(), logits.options());

  RouteBackwardParams params = {};
  params.grad_weights = dense_grads.const_data_ptr<float>();
  params.logits = dense_logits.const_data_ptr();
  params.element_type = element_type;
  params.weights = dense_weights.const_data_ptr<float>();
  params.expert_ids = dense_ids.const_data_ptr<int64_t>();
  params.num_tokens = logits.size(0);
  params.num_experts = static_cast<int>(logits.size(1));
  params.top_k = static_cast<int>(top_k);
  params.normalize = normalize;
  params.grad_logits = grad_logits.mutable_data_ptr();
  C10_CUDA_CHECK(launch_route_backward(params, at::cuda::getCurrentCUDAStream()));
  return grad_logits;
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) {
  m.impl("route", &route_cuda);
  m.impl("route_backward", &route_backward_cuda);
}

}  // namespace torch_moe_ep
