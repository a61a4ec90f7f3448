#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/dispatch_dtype.h"
#include "route/sinkhorn.h"

namespace torch_moe_ep {
namespace {

// Fixed, so that sums do not depend on the number of threads.
constexpr int64_t kTokensPerTask = 256;

// row[e] = softmax over e of logits[e] + offsets[e].
template <typename T>
void shifted_softmax(const T* logits, const std::vector<float>& offsets, float* row) {
  const auto num_experts = static_cast<int64_t>(offsets.size());
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t e = 0; e < num_experts; ++e) {
    row[e] = static_cast<float>(logits[e]) + offsets[e];
    largest = std::max(largest, row[e]);
  }
  float sum = 0.0f;
  for (int64_t e = 0; e < num_experts; ++e) {
    row[e] = std::exp(row[e] - largest);
    sum += row[e];
  }
  for (int64_t e = 0; e < num_experts; ++e) row[e] /= sum;
}

// Runs visit(task, t, softmax of token t) for every token; tasks run in parallel.
template <typename T, typename Visit>
void for_each_row(const T* logits,
                  int64_t num_tokens,
                  const std::vector<float>& offsets,
                  const Visit& visit) {
  const auto num_experts = static_cast<int64_t>(offsets.size());
  const int64_t num_tasks = (num_tokens + kTokensPerTask - 1) / kTokensPerTask;
  at::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(num_experts);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t last = std::min(num_tokens, (task + 1) * kTokensPerTask);
      for (int64_t t = task * kTokensPerTask; t < last; ++t) {
        shifted_softmax(logits + t * num_experts, offsets, row.data());
        visit(task, t, row.data());
      }
    }
  });
}

// How often each expert is chosen, softly: the column sums of the softmax rows.
template <typename T>
std::vector<double> column_sums(const T* logits,
                                int64_t num_tokens,
                                const std::vector<float>& offsets) {
  const auto num_experts = static_cast<int64_t>(offsets.size());
  const int64_t num_tasks = (num_tokens + kTokensPerTask - 1) / kTokensPerTask;
  std::vector<double> partial(num_tasks * num_experts, 0.0);
  for_each_row(logits, num_tokens, offsets, [&](int64_t task, int64_t, const float* row) {
    for (int64_t e = 0; e < num_experts; ++e) partial[task * num_experts + e] += row[e];
  });
  std::vector<double> sums(num_experts, 0.0);
  for (int64_t i = 0; i < num_tasks * num_experts; ++i) sums[i % num_experts] += partial[i];
  return sums;
}

// An expert whose share underflowed is raised by a finite step; the next iterations find it. Not
// std::max, which would hide a NaN.
float correction(double column_sum, double wanted) {
  return static_cast<float>(std::log(wanted / (column_sum < 1e-37 ? 1e-37 : column_sum)));
}

template <typename T>
void sinkhorn_loop(
    const T* logits, int64_t num_tokens, int64_t num_experts, int64_t num_iterations, float* plan) {
  const double wanted = static_cast<double>(num_tokens) / static_cast<double>(num_experts);
  std::vector<float> offsets(num_experts, 0.0f);  // log d1
  std::vector<float> factors(num_experts);
  for (int64_t i = 0; i < num_iterations; ++i) {
    const std::vector<double> sums = column_sums(logits, num_tokens, offsets);
    const bool is_last = i + 1 == num_iterations;
    for (int64_t e = 0; e < num_experts; ++e) {
      const float step = correction(sums[e], wanted);
      factors[e] = std::exp(step) / static_cast<float>(num_tokens);
      if (!is_last) offsets[e] += step;
    }
  }
  for_each_row(logits, num_tokens, offsets, [&](int64_t, int64_t t, const float* row) {
    for (int64_t e = 0; e < num_experts; ++e) plan[t * num_experts + e] = row[e] * factors[e];
  });
}

}  // namespace

at::Tensor sinkhorn_cpu(const at::Tensor& logits, int64_t num_iterations) {
  check_sinkhorn(logits, num_iterations);
  const at::Tensor dense = logits.contiguous();
  at::Tensor plan = at::empty(logits.sizes(), logits.options().dtype(at::kFloat));
  if (plan.numel() == 0) return plan;
  float* values = plan.mutable_data_ptr<float>();
  TORCH_MOE_EP_DISPATCH_DTYPE(dense.scalar_type(), "sinkhorn_cpu", [&] {
    sinkhorn_loop(
        dense.const_data_ptr<scalar_t>(), dense.size(0), dense.size(1), num_iterations, values);
  });
  return plan;
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CPU, m) { m.impl("sinkhorn", &sinkhorn_cpu); }

}  // namespace torch_moe_ep
