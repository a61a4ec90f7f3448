#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "common/dispatch_dtype.h"
#include "route/route.h"

namespace torch_moe_ep {
namespace {

constexpr int64_t kTokensPerTask = 64;

template <typename T>
void softmax(const T* logits, int64_t num_experts, float* probabilities) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t e = 0; e < num_experts; ++e) {
    largest = std::max(largest, static_cast<float>(logits[e]));
  }
  float sum = 0.0f;
  for (int64_t e = 0; e < num_experts; ++e) {
    probabilities[e] = std::exp(static_cast<float>(logits[e]) - largest);
    sum += probabilities[e];
  }
  for (int64_t e = 0; e < num_experts; ++e) probabilities[e] /= sum;
}

// The top_k of `probabilities`, which is used up. A row of NaN gives the ids 0, 1, ...
void take_top_k(std::vector<float>& probabilities,
                int64_t top_k,
                bool normalize,
                float* weights,
                int64_t* expert_ids) {
  float sum = 0.0f;
  for (int64_t k = 0; k < top_k; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < static_cast<int64_t>(probabilities.size()); ++e) {
      const float value = probabilities[e];
      if (value < 0.0f) continue;  // taken
      if (best < 0 || value > probabilities[best]) best = e;
    }
    weights[k] = probabilities[best];
    expert_ids[k] = best;
    sum += weights[k];
    probabilities[best] = -1.0f;
  }
  if (normalize) {
    for (int64_t k = 0; k < top_k; ++k) weights[k] /= sum;
  }
}

struct Choice {
  const float* grads;
  const float* weights;
  const int64_t* expert_ids;
  int64_t top_k;
};

// The formulas are in route.h.
template <typename T>
void backward_of_token(const Choice& choice,
                       const T* logits,
                       int64_t num_experts,
                       bool normalize,
                       std::vector<float>& scratch,
                       T* grad_logits) {
  float dot = 0.0f;
  for (int64_t k = 0; k < choice.top_k; ++k) dot += choice.grads[k] * choice.weights[k];
  if (normalize) {
    // Zero, and NaN where a NaN weight has made the whole row one.
    std::fill(scratch.begin(), scratch.end(), 0.0f * dot);
  } else {
    softmax(logits, num_experts, scratch.data());
    for (float& value : scratch) value *= -dot;
  }
  for (int64_t k = 0; k < choice.top_k; ++k) {
    scratch[choice.expert_ids[k]] = choice.weights[k] * (choice.grads[k] - dot);
  }
  for (int64_t e = 0; e < num_experts; ++e) grad_logits[e] = static_cast<T>(scratch[e]);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> route_cpu(const at::Tensor& logits,
                                             int64_t top_k,
                                             bool normalize) {
  check_route(logits, top_k);
  const int64_t num_tokens = logits.size(0);
  const int64_t num_experts = logits.size(1);
  const at::Tensor dense = logits.contiguous();
  at::Tensor weights = at::empty({num_tokens, top_k}, logits.options().dtype(at::kFloat));
  at::Tensor expert_ids = at::empty({num_tokens, top_k}, logits.options().dtype(at::kLong));
  float* weight = weights.mutable_data_ptr<float>();
  int64_t* id = expert_ids.mutable_data_ptr<int64_t>();
  TORCH_MOE_EP_DISPATCH_DTYPE(dense.scalar_type(), "route_cpu", [&] {
    const scalar_t* values = dense.const_data_ptr<scalar_t>();
    at::parallel_for(0, num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      std::vector<float> probabilities(num_experts);
      for (int64_t t = begin; t < end; ++t) {
        softmax(values + t * num_experts, num_experts, probabilities.data());
        take_top_k(probabilities, top_k, normalize, weight + t * top_k, id + t * top_k);
      }
    });
  });
  return {weights, expert_ids};
}

at::Tensor route_backward_cpu(const at::Tensor& grad_weights,
                              const at::Tensor& logits,
                              const at::Tensor& weights,
                              const at::Tensor& expert_ids,
                              bool normalize) {
  check_route_backward(grad_weights, logits, weights, expert_ids);
  const int64_t num_experts = logits.size(1);
  const int64_t top_k = expert_ids.size(1);
  const at::Tensor dense_grads = grad_weights.contiguous();
  const at::Tensor dense_logits = logits.contiguous();
  const at::Tensor dense_weights = weights.contiguous();
  const at::Tensor dense_ids = expert_ids.contiguous();
  at::Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  const float* grad = dense_grads.const_data_ptr<float>();
  const float* weight = dense_weights.const_data_ptr<float>();
  const int64_t* id = dense_ids.const_data_ptr<int64_t>();
  TORCH_MOE_EP_DISPATCH_DTYPE(dense_logits.scalar_type(), "route_backward_cpu", [&] {
    const scalar_t* values = dense_logits.const_data_ptr<scalar_t>();
    scalar_t* out = grad_logits.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, logits.size(0), kTokensPerTask, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(num_experts);
      for (int64_t t = begin; t < end; ++t) {
        const Choice choice = {grad + t * top_k, weight + t * top_k, id + t * top_k, top_k};
        backward_of_token(choice,
                          values + t * num_experts,
                          num_experts,
                          normalize,
                          scratch,
                          out + t * num_experts);
      }
    });
  });
  return grad_logits;
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CPU, m) {
  m.impl("route", &route_cpu);
  m.impl("route_backward", &route_backward_cpu);
}

}  // namespace torch_moe_ep
