#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "combine/combine.h"
#include "combine/gather_rows.h"
#include "comm/collective.h"
#include "comm/label.h"
#include "common/dispatch_dtype.h"
#include "common/exchange_sizes.h"
#include "common/segments.h"

namespace torch_moe_ep {
namespace {

constexpr int64_t kElementsPerTask = 1 << 14;

// out = sum over k of rows[slot[k]] in ascending k, without slots of -1; one copy keeps the row's
// bits.
template <typename T>
void sum_rows(
    const T* rows, const int64_t* slot, int64_t copies, std::vector<float>& sums, T* out) {
  const auto hidden = static_cast<int64_t>(sums.size());
  if (copies == 1 && slot[0] >= 0) {
    std::copy_n(rows + slot[0] * hidden, hidden, out);
    return;
  }
  std::fill(sums.begin(), sums.end(), 0.0f);
  for (int64_t k = 0; k < copies; ++k) {
    if (slot[k] < 0) continue;
    const T* row = rows + slot[k] * hidden;
    for (int64_t h = 0; h < hidden; ++h) sums[h] += static_cast<float>(row[h]);
  }
  for (int64_t h = 0; h < hidden; ++h) out[h] = static_cast<T>(sums[h]);
}

at::Tensor gather_rows(const at::Tensor& rows, const at::Tensor& slot_of_copy, int64_t copies) {
  const at::Tensor dense = rows.contiguous();
  const int64_t hidden = rows.size(1);
  const int64_t num_outputs = slot_of_copy.numel() / copies;
  at::Tensor out = at::empty({num_outputs, hidden}, rows.options());
  const int64_t* slot = slot_of_copy.const_data_ptr<int64_t>();
  const int64_t grain = kElementsPerTask / (hidden * copies + 1) + 1;
  TORCH_MOE_EP_DISPATCH_DTYPE(rows.scalar_type(), "combine_cpu", [&] {
    const scalar_t* from = dense.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, num_outputs, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(hidden);
      for (int64_t t = begin; t < end; ++t) {
        sum_rows(from, slot + t * copies, copies, sums, to + t * hidden);
      }
    });
  });
  return out;
}

// [num_outputs, copies], 0 for a slot of -1; [0] without row weights.
at::Tensor gather_weights(const std::optional<at::Tensor>& row_weights,
                          const at::Tensor& slot_of_copy,
                          int64_t copies,
                          const at::Tensor& rows) {
  if (!row_weights) return at::empty({0}, rows.options().dtype(at::kFloat));
  at::Tensor weights = at::empty({slot_of_copy.numel() / copies, copies}, row_weights->options());
  const at::Tensor dense = row_weights->contiguous();
  const float* from = dense.const_data_ptr<float>();
  float* to = weights.mutable_data_ptr<float>();
  const int64_t* slot = slot_of_copy.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < slot_of_copy.numel(); ++n) to[n] = slot[n] < 0 ? 0.0f : from[slot[n]];
  return weights;
}

}  // namespace

Gathered gather_rows_cpu(const at::Tensor& rows,
                         const std::optional<at::Tensor>& row_weights,
                         const at::Tensor& slot_of_copy,
                         int64_t copies_per_output) {
  return {gather_rows(rows, slot_of_copy, copies_per_output),
          gather_weights(row_weights, slot_of_copy, copies_per_output, rows)};
}

std::tuple<at::Tensor, at::Tensor> combine_cpu(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& row_weights,
    const at::Tensor& slot_of_copy,
    const at::Tensor& slot_of_received,
    const at::Tensor& /*expert_offsets*/,
    const at::Tensor& counts,
    const at::Tensor& host_counts,
    int64_t top_k,
    int64_t row_alignment,
    const std::string& group_name,
    const std::optional<at::Tensor>& /*tokens_per_expert*/) {
  if (group_name.empty()) {
    const int64_t num_slots = slot_bound(slot_of_copy.numel(), counts.size(1), row_alignment);
    check_combine(rows, row_weights, slot_of_copy, num_slots, top_k);
    return {gather_rows(rows, slot_of_copy, top_k),
            gather_weights(row_weights, slot_of_copy, top_k, rows)};
  }
  const comm::ScopedStage stage("combine");
  const ExchangeSizes sizes =
      exchange_sizes(host_counts, comm::group_rank(group_name), row_alignment);
  check_combine(rows, row_weights, slot_of_copy, sizes.num_slots, top_k);
  // Rows go back in the order in which they came, then to the slots that plan gave the copies.
  const auto of_copies = comm::all_to_all_rows(
      {gather_rows(rows, slot_of_received, 1),
       row_weights ? row_weights->index_select(0, slot_of_received) : at::Tensor()},
      sizes.received_rows,
      sizes.send_rows,
      group_name);
  return {gather_rows(of_copies[0], slot_of_copy, top_k),
          gather_weights(given(of_copies[1]), slot_of_copy, top_k, rows)};
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CPU, m) { m.impl("combine", &combine_cpu); }

}  // namespace torch_moe_ep
