#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "combine/combine.h"
#include "combine/combine_kernels.h"
#include "combine/gather_rows.h"
#include "comm/collective.h"
#include "comm/label.h"
#include "common/element_type_of.h"
#include "common/exchange_sizes.h"
#include "common/segments.h"

namespace torch_moe_ep {

Gathered gather_rows_cuda(const at::Tensor& rows,
                          const std::optional<at::Tensor>& row_weights,
                          const at::Tensor& slot_of_copy,
                          int64_t copies_per_output) {
  const at::Tensor dense_rows = rows.contiguous();
  const at::Tensor dense_weights = row_weights ? row_weights->contiguous() : at::Tensor();
  const int64_t num_outputs = slot_of_copy.numel() / copies_per_output;
  Gathered gathered = {at::empty({num_outputs, rows.size(1)}, rows.options()),
                       at::empty({0}, rows.options().dtype(at::kFloat))};
  GatheredRows params = {};
  params.rows = dense_rows.const_data_ptr();
  params.out = gathered.out.mutable_data_ptr();
  if (row_weights.has_value()) {
    gathered.weights =
        at::empty({num_outputs, copies_per_output}, rows.options().dtype(at::kFloat));
    params.row_weights = dense_weights.const_data_ptr<float>();
    params.weights = gathered.weights.mutable_data_ptr<float>();
  }
  params.slot_of_copy = slot_of_copy.const_data_ptr<int64_t>();
  params.num_outputs = num_outputs;
  params.copies_per_output = static_cast<int>(copies_per_output);
  params.row_elements = rows.size(1);
  params.element_type = element_type_of(rows);
  C10_CUDA_CHECK(launch_gather_rows(params, at::cuda::getCurrentCUDAStream()));
  return gathered;
}

std::tuple<at::Tensor, at::Tensor> combine_cuda(const at::Tensor& rows,
                                                const std::optional<at::Tensor>& row_weights,
                                                const at::Tensor& slot_of_copy,
                                                const at::Tensor& slot_of_received,
                                                const at::Tensor& /*expert_offsets*/,
                                                const at::Tensor& counts,
                                                const at::Tensor& host_counts,
                                                int64_t top_k,
                                                int64_t row_alignment,
                                                const std::string& group_name,
                                                const std::optional<at::Tensor>&
                                                /*tokens_per_expert*/) {
  const c10::cuda::CUDAGuard guard(rows.device());
  if (group_name.empty()) {
    const int64_t num_slots = slot_bound(slot_of_copy.numel(), counts.size(1), row_alignment);
    check_combine(rows, row_weights, slot_of_copy, num_slots, top_k);
    Gathered gathered = gather_rows_cuda(rows, row_weights, slot_of_copy, top_k);
    return {gathered.out, gathered.weights};
  }
  const comm::ScopedStage stage("combine");
  const ExchangeSizes sizes =
      exchange_sizes(host_counts, comm::group_rank(group_name), row_alignment);
  check_combine(rows, row_weights, slot_of_copy, sizes.num_slots, top_k);
  // Rows go back in the order in which they came, then to the slots that plan gave the copies.
  const Gathered returned = gather_rows_cuda(rows, row_weights, slot_of_received, 1);
  const auto of_copies = comm::all_to_all_rows(
      {returned.out, row_weights ? returned.weights.reshape({-1}) : at::Tensor()},
      sizes.received_rows,
      sizes.send_rows,
      group_name);
  Gathered gathered = gather_rows_cuda(of_copies[0], given(of_copies[1]), slot_of_copy, top_k);
  return {gathered.out, gathered.weights};
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) { m.impl("combine", &combine_cuda); }

}  // namespace torch_moe_ep
