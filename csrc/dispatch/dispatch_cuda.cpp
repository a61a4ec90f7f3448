#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/env.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "comm/collective.h"
#include "comm/label.h"
#include "common/exchange_sizes.h"
#include "common/segments.h"
#include "dispatch/dispatch.h"
#include "dispatch/dispatch_cuda.h"
#include "dispatch/dispatch_kernels.h"
#include "dispatch/pack_rows.h"

namespace torch_moe_ep {
namespace {

// The hand-written expert GEMMs read tiles of this many rows.
constexpr int64_t kGemmRowAlignment = 128;

}  // namespace

Places place_copies_cuda(const at::Tensor& expert_ids,
                         int64_t num_experts,
                         int64_t row_alignment,
                         const at::Tensor& invalid_flag) {
  const auto options = expert_ids.options();
  Places places = {at::empty({expert_ids.numel()}, options),
                   at::empty({num_experts + 1}, options),
                   at::empty({num_experts}, options)};
  place_copies_into_cuda(expert_ids, 0, row_alignment, invalid_flag, places);
  return places;
}

void place_copies_into_cuda(const at::Tensor& expert_ids,
                            int64_t first_slot,
                            int64_t row_alignment,
                            const at::Tensor& invalid_flag,
                            const Places& places) {
  const int64_t num_copies = expert_ids.numel();
  const int64_t num_experts = places.counts.numel();
  const at::Tensor ids = expert_ids.contiguous();
  const at::Tensor block_counts =
      at::empty({num_place_blocks(num_copies), num_experts}, ids.options().dtype(at::kInt));

  CopyPlaces params = {};
  params.expert_ids = ids.const_data_ptr<int64_t>();
  params.num_copies = num_copies;
  params.num_experts = static_cast<int>(num_experts);
  params.row_alignment = static_cast<int>(row_alignment);
  params.block_counts = block_counts.mutable_data_ptr<int32_t>();
  params.slot_of_copy = places.slot_of_copy.mutable_data_ptr<int64_t>();
  if (places.segment_offsets.defined()) {
    params.segment_offsets = places.segment_offsets.mutable_data_ptr<int64_t>();
  }
  params.first_slot = first_slot;
  params.counts = places.counts.mutable_data_ptr<int64_t>();
  params.invalid_flag = invalid_flag.mutable_data_ptr<int32_t>();
  C10_CUDA_CHECK(launch_place_copies(params, at::cuda::getCurrentCUDAStream()));
}

namespace {

void place_received(const at::Tensor& counts,
                    int64_t rank,
                    int64_t row_alignment,
                    const at::Tensor& slot_of_received,
                    const at::Tensor& expert_offsets) {
  ReceivedPlaces params = {};
  params.counts = counts.const_data_ptr<int64_t>();
  params.num_ranks = static_cast<int>(counts.size(0));
  params.num_experts = static_cast<int>(counts.size(1));
  params.rank = static_cast<int>(rank);
  params.row_alignment = static_cast<int>(row_alignment);
  params.slot_of_received = slot_of_received.mutable_data_ptr<int64_t>();
  params.expert_offsets = expert_offsets.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(launch_place_received(params, at::cuda::getCurrentCUDAStream()));
}

}  // namespace

Packed pack_rows_cuda(const Source& source, int64_t num_slots, const Padding* padding) {
  const auto weight_options = source.rows.options().dtype(at::kFloat);
  Packed packed = {at::empty({num_slots, source.rows.size(1)}, source.rows.options()),
                   at::empty({source.weights.defined() ? num_slots : 0}, weight_options)};
  pack_rows_into_cuda(source, packed, padding);
  return packed;
}

void pack_rows_into_cuda(const Source& source, const Packed& into, const Padding* padding) {
  PackedRows params = {};
  params.source = source.rows.const_data_ptr();
  params.rows = into.rows.mutable_data_ptr();
  if (source.weights.defined()) {
    params.weights = source.weights.const_data_ptr<float>();
    params.row_weights = into.row_weights.mutable_data_ptr<float>();
  }
  params.slot_of_copy = source.slot_of_copy.const_data_ptr<int64_t>();
  params.num_sources = source.rows.size(0);
  params.copies_per_source = static_cast<int>(source.copies_per_source);
  params.row_bytes = source.rows.size(1) * source.rows.element_size();
  if (padding != nullptr) {
    const int64_t num_local = (padding->expert_offsets.numel() - 1) / padding->num_chunks;
    params.expert_offsets = padding->expert_offsets.const_data_ptr<int64_t>();
    params.counts = padding->counts.const_data_ptr<int64_t>();
    params.num_ranks = static_cast<int>(padding->counts.size(0));
    params.num_experts = static_cast<int>(padding->counts.size(1));
    params.num_local_experts = static_cast<int>(num_local);
    params.first_expert = static_cast<int>(padding->rank * num_local);
    params.row_alignment = static_cast<int>(padding->row_alignment);
    params.num_chunks = static_cast<int>(padding->num_chunks);
    params.chunk = static_cast<int>(padding->chunk);
  }
  C10_CUDA_CHECK(launch_pack_rows(params, at::cuda::getCurrentCUDAStream()));
}

void check_top_k_on_cuda(int64_t top_k) {
  TORCH_CHECK_VALUE(top_k <= kMaxTopK, "top_k must be at most ", kMaxTopK, " on CUDA, got ", top_k);
}

namespace {

Source source_of(const at::Tensor& x,
                 const std::optional<at::Tensor>& weights,
                 const at::Tensor& slot_of_copy,
                 int64_t top_k) {
  return {x.contiguous(), weights ? weights->contiguous() : at::Tensor(), slot_of_copy, top_k};
}

// The send buffer, with room for every copy.
Packed pack_tokens(const at::Tensor& x,
                   const std::optional<at::Tensor>& weights,
                   const at::Tensor& slot_of_copy,
                   int64_t top_k) {
  check_dispatch(x, weights, slot_of_copy, top_k);
  check_top_k_on_cuda(top_k);
  return pack_rows_cuda(source_of(x, weights, slot_of_copy, top_k), slot_of_copy.numel(), nullptr);
}

}  // namespace

void check_plan_on_cuda(int64_t num_experts, int64_t row_alignment) {
  TORCH_CHECK_VALUE(num_experts <= kMaxExperts,
                    "num_experts must be at most ",
                    kMaxExperts,
                    " on CUDA, got ",
                    num_experts);
  TORCH_CHECK_VALUE(row_alignment > 0 && row_alignment % kGemmRowAlignment == 0,
                    "row_alignment must be a multiple of ",
                    kGemmRowAlignment,
                    " on CUDA, where the expert GEMMs read whole tiles, got ",
                    row_alignment);
}

void check_ids_at_once(const at::Tensor& invalid_flag, const std::string& group_name) {
  if (!c10::utils::check_env("TORCH_MOE_EP_CHECK").value_or(false)) return;
  const at::Tensor flag = invalid_flag.reshape({1}).to(at::kLong);
  const at::Tensor host_flags = group_name.empty()
                                    ? flag.unsqueeze(0).to(at::kCPU)
                                    : comm::CountExchange(flag, group_name).wait().host_counts;
  const auto rows = host_flags.accessor<int64_t, 2>();
  for (int64_t rank = 0; rank < host_flags.size(0); ++rank) {
    if (rows[rank][0] == 0) continue;
    invalid_flag.zero_();
    TORCH_CHECK_VALUE(false,
                      "expert_ids must be in [0, num_experts), got others on rank ",
                      rank,
                      " of the expert-parallel group (check the router)");
  }
}

PlanTensors plan_cuda(const at::Tensor& expert_ids,
                      int64_t num_experts,
                      int64_t row_alignment,
                      int64_t max_rows,
                      const std::string& group_name,
                      const at::Tensor& invalid_flag,
                      const std::optional<at::Tensor>& x,
                      const std::optional<at::Tensor>& weights) {
  check_plan(expert_ids, num_experts, row_alignment, invalid_flag);
  check_plan_on_cuda(num_experts, row_alignment);
  const c10::cuda::CUDAGuard guard(expert_ids.device());
  const auto host_options = at::TensorOptions().dtype(at::kLong);
  const auto float_options = expert_ids.options().dtype(at::kFloat);
  Packed sent = {at::empty({0, 0}, float_options), at::empty({0}, float_options)};
  if (group_name.empty()) {
    const int64_t num_slots = slot_bound(expert_ids.numel(), num_experts, row_alignment);
    check_max_rows(num_slots, max_rows);
    Places places = place_copies_cuda(expert_ids, num_experts, row_alignment, invalid_flag);
    check_ids_at_once(invalid_flag, group_name);
    return {places.slot_of_copy,
            at::empty({0}, expert_ids.options()),
            places.segment_offsets,
            places.counts.unsqueeze(0),
            at::empty({0, num_experts}, host_options),
            sent.rows,
            sent.row_weights};
  }
  const int64_t num_ranks = comm::group_size(group_name);
  const comm::ScopedStage stage("plan");
  const int64_t rank = comm::group_rank(group_name);
  check_experts_over_ranks(num_experts, num_ranks);
  // Send order is expert order without padding.
  const Places places = place_copies_cuda(expert_ids, num_experts, 1, invalid_flag);
  check_ids_at_once(invalid_flag, group_name);
  comm::CountExchange exchange(places.counts, group_name);
  if (x.has_value()) sent = pack_tokens(*x, weights, places.slot_of_copy, expert_ids.size(1));
  // The one host wait of a layer's forward.
  const auto [counts, host_counts] = exchange.wait();
  const ExchangeSizes sizes = exchange_sizes(host_counts, rank, row_alignment);
  check_max_rows(sizes.largest_num_slots, max_rows);
  const at::Tensor slot_of_received = at::empty({sizes.num_received}, counts.options());
  const at::Tensor expert_offsets = at::empty({num_experts / num_ranks + 1}, counts.options());
  place_received(counts, rank, row_alignment, slot_of_received, expert_offsets);
  return {places.slot_of_copy,
          slot_of_received,
          expert_offsets,
          counts,
          host_counts,
          sent.rows,
          sent.row_weights};
}

std::tuple<at::Tensor, at::Tensor> dispatch_cuda(const at::Tensor& x,
                                                 const std::optional<at::Tensor>& weights,
                                                 const at::Tensor& slot_of_copy,
                                                 const at::Tensor& slot_of_received,
                                                 const at::Tensor& expert_offsets,
                                                 const at::Tensor& counts,
                                                 const at::Tensor& host_counts,
                                                 int64_t top_k,
                                                 int64_t row_alignment,
                                                 const std::string& group_name,
                                                 const std::optional<at::Tensor>& send_rows,
                                                 const std::optional<at::Tensor>& send_weights) {
  check_dispatch(x, weights, slot_of_copy, top_k);
  check_top_k_on_cuda(top_k);
  const c10::cuda::CUDAGuard guard(x.device());
  if (group_name.empty()) {
    const Source tokens = source_of(x, weights, slot_of_copy, top_k);
    const Padding padding = {expert_offsets, counts, 0, row_alignment};
    const int64_t num_slots =
        slot_bound(slot_of_copy.numel(), expert_offsets.numel() - 1, row_alignment);
    Packed packed = pack_rows_cuda(tokens, num_slots, &padding);
    return {packed.rows, packed.row_weights};
  }
  const comm::ScopedStage stage("dispatch");
  const int64_t rank = comm::group_rank(group_name);
  const ExchangeSizes sizes = exchange_sizes(host_counts, rank, row_alignment);
  Packed sent;
  if (send_rows.has_value()) {
    check_packed(x, weights.has_value(), slot_of_copy, *send_rows, send_weights);
    sent = {*send_rows, send_weights.value_or(at::Tensor())};
  } else {
    sent = pack_tokens(x, weights, slot_of_copy, top_k);
  }
  // Copies of invalid ids, which are not sent, leave the end of the buffer free.
  const auto received = comm::all_to_all_rows(
      {sent.rows.narrow(0, 0, sizes.num_sent),
       weights ? sent.row_weights.narrow(0, 0, sizes.num_sent) : at::Tensor()},
      sizes.send_rows,
      sizes.received_rows,
      group_name);
  const Source arrived = {received[0], received[1], slot_of_received, 1};
  const Padding padding = {expert_offsets, counts, rank, row_alignment};
  Packed packed = pack_rows_cuda(arrived, sizes.num_slots, &padding);
  return {packed.rows, packed.row_weights};
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) {
  m.impl("plan", &plan_cuda);
  m.impl("dispatch", &dispatch_cuda);
}

}  // namespace torch_moe_ep
