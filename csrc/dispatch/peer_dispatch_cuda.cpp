#include "dispatch/peer_dispatch.h"

#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "comm/label.h"
#include "comm/peer.h"
#include "common/peer_movement.h"
#include "dispatch/dispatch.h"
#include "dispatch/dispatch_cuda.h"
#include "dispatch/dispatch_kernels.h"
#include "dispatch/peer_kernels.h"

namespace torch_moe_ep {
namespace {

using PeerPlanTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The first slots of this rank's copies for each expert, and the offsets of its own experts.
std::tuple<at::Tensor, at::Tensor> place_segments(const at::Tensor& counts,
                                                  int64_t rank,
                                                  int64_t row_alignment,
                                                  int64_t capacity,
                                                  const at::Tensor& slots_needed) {
  const int64_t num_experts = counts.size(1);
  const at::Tensor first_slots = at::empty({num_experts}, counts.options());
  const at::Tensor offsets = at::empty({num_experts / counts.size(0) + 1}, counts.options());
  PeerSegments params = {};
  params.counts = counts.const_data_ptr<int64_t>();
  params.num_ranks = static_cast<int>(counts.size(0));
  params.num_experts = static_cast<int>(num_experts);
  params.rank = static_cast<int>(rank);
  params.row_alignment = static_cast<int>(row_alignment);
  params.capacity = capacity;
  params.first_slots = first_slots.mutable_data_ptr<int64_t>();
  params.expert_offsets = offsets.mutable_data_ptr<int64_t>();
  params.slots_needed = slots_needed.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(launch_place_segments(params, at::cuda::getCurrentCUDAStream()));
  return {first_slots, offsets};
}

// Turns places in expert order into slots on their owners.
void place_on_owners(const Places& places,
                     const at::Tensor& expert_ids,
                     const at::Tensor& first_slots,
                     int64_t num_local,
                     int64_t capacity) {
  const at::Tensor ids = expert_ids.contiguous();
  PeerCopyPlaces params = {};
  params.expert_ids = ids.const_data_ptr<int64_t>();
  params.num_copies = ids.numel();
  params.num_local_experts = static_cast<int>(num_local);
  params.capacity = capacity;
  params.segment_offsets = places.segment_offsets.const_data_ptr<int64_t>();
  params.first_slots = first_slots.const_data_ptr<int64_t>();
  params.slot_of_copy = places.slot_of_copy.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(launch_place_peer_copies(params, at::cuda::getCurrentCUDAStream()));
}

PeerPlanTensors peer_plan_cuda(const at::Tensor& expert_ids,
                               int64_t num_experts,
                               int64_t row_alignment,
                               int64_t max_rows,
                               int64_t capacity,
                               const std::string& group_name,
                               const at::Tensor& invalid_flag,
                               const at::Tensor& slots_needed) {
  check_plan(expert_ids, num_experts, row_alignment, invalid_flag);
  check_plan_on_cuda(num_experts, row_alignment);
  check_peer_plan(row_alignment, capacity, slots_needed);
  const c10::cuda::CUDAGuard guard(expert_ids.device());
  const comm::ScopedStage stage("plan");
  comm::PeerGroup& peers = comm::PeerGroup::of(group_name, expert_ids.device());
  check_experts_over_ranks(num_experts, peers.size());
  const Places places = place_copies_cuda(expert_ids, num_experts, 1, invalid_flag);
  check_ids_at_once(invalid_flag, group_name);
  const auto [counts, host_counts] = peers.gather(places.counts, /*wants_host=*/capacity == 0);
  if (capacity == 0) {
    check_max_rows(exchange_sizes(host_counts, peers.rank(), row_alignment).largest_num_slots,
                   max_rows);
  }
  const auto [first_slots, expert_offsets] =
      place_segments(counts, peers.rank(), row_alignment, capacity, slots_needed);
  place_on_owners(places, expert_ids, first_slots, num_experts / peers.size(), capacity);
  return {places.slot_of_copy, expert_offsets, counts, host_counts};
}

void push_rows(const at::Tensor& x,
               const at::Tensor& weights,
               const PeerPlan& plan,
               const PeerLayout& layout,
               const comm::SharedMemory& buffer) {
  PushedRows params = {};
  params.source = x.const_data_ptr();
  params.weights = weights.defined() ? weights.const_data_ptr<float>() : nullptr;
  params.buffers = buffer.on_ranks();
  params.weights_offset = layout.weights_offset;
  params.slot_of_copy = plan.slot_of_copy.const_data_ptr<int64_t>();
  params.num_sources = x.size(0);
  params.copies_per_source = static_cast<int>(plan.top_k);
  params.row_bytes = layout.row_bytes;
  params.num_sms = static_cast<int>(plan.num_sms);
  C10_CUDA_CHECK(launch_push_rows(params, at::cuda::getCurrentCUDAStream()));
}

// Rows in the buffer of this rank, which outlives them.
PeerMoved rows_in_buffer(const at::Tensor& x,
                         bool has_weights,
                         int64_t num_slots,
                         const PeerLayout& layout,
                         const at::Tensor& buffer) {
  const at::Tensor rows = buffer.narrow(0, 0, num_slots * layout.row_bytes).view(x.scalar_type());
  const int64_t num_weights = has_weights ? num_slots : 0;
  const int64_t weight_bytes = num_weights * static_cast<int64_t>(sizeof(float));
  const at::Tensor weights = buffer.narrow(0, layout.weights_offset, weight_bytes).view(at::kFloat);
  return {rows.view({num_slots, x.size(1)}), weights};
}

// As many rows as there are, into memory of their own.
at::Tensor counted_copy(const at::Tensor& rows, const at::Tensor& expert_offsets) {
  at::Tensor copied = at::empty(rows.sizes(), rows.options());
  comm::CountedCopy params = {};
  params.source = rows.const_data_ptr();
  params.target = copied.mutable_data_ptr();
  params.unit_bytes = (rows.dim() == 2 ? rows.size(1) : 1) * rows.element_size();
  params.num_units = expert_offsets.const_data_ptr<int64_t>() + expert_offsets.numel() - 1;
  params.max_units = rows.size(0);
  C10_CUDA_CHECK(comm::launch_counted_copy(params, at::cuda::getCurrentCUDAStream()));
  return copied;
}

void zero_padding(const PeerMoved& moved, const PeerPlan& plan, int64_t rank) {
  const auto& [rows, row_weights] = moved;
  const int64_t num_local = plan.expert_offsets.numel() - 1;
  PackedRows params = {};
  params.rows = rows.mutable_data_ptr();
  if (row_weights.numel() > 0) params.row_weights = row_weights.mutable_data_ptr<float>();
  params.row_bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  params.copies_per_source = 1;
  params.expert_offsets = plan.expert_offsets.const_data_ptr<int64_t>();
  params.counts = plan.counts.const_data_ptr<int64_t>();
  params.num_ranks = static_cast<int>(plan.counts.size(0));
  params.num_experts = static_cast<int>(plan.counts.size(1));
  params.num_local_experts = static_cast<int>(num_local);
  params.first_expert = static_cast<int>(rank * num_local);
  params.row_alignment = static_cast<int>(plan.row_alignment);
  C10_CUDA_CHECK(launch_pack_rows(params, at::cuda::getCurrentCUDAStream()));
}

PeerMoved peer_dispatch_cuda(const at::Tensor& x,
                             const std::optional<at::Tensor>& weights,
                             const at::Tensor& slot_of_copy,
                             const at::Tensor& expert_offsets,
                             const at::Tensor& counts,
                             const at::Tensor& host_counts,
                             int64_t top_k,
                             int64_t row_alignment,
                             int64_t capacity,
                             int64_t num_sms,
                             const std::string& group_name,
                             bool keep) {
  check_dispatch(x, weights, slot_of_copy, top_k);
  check_top_k_on_cuda(top_k);
  check_num_sms(num_sms);
  const c10::cuda::CUDAGuard guard(x.device());
  const comm::ScopedStage stage("dispatch");
  comm::PeerGroup& peers = comm::PeerGroup::of(group_name, x.device());
  const PeerPlan plan = {slot_of_copy,
                         expert_offsets,
                         counts,
                         host_counts,
                         top_k,
                         row_alignment,
                         capacity,
                         num_sms,
                         group_name};
  const PeerSlots slots = peer_slots(plan, peers.rank());
  const PeerLayout layout = peer_layout(slots.room, x);
  peers.reserve(layout.num_bytes);
  peers.meet();  // nobody reads or writes the buffers for what came before
  push_rows(
      x.contiguous(), weights ? weights->contiguous() : at::Tensor(), plan, layout, peers.buffer());
  peers.meet();  // all rows have come
  PeerMoved moved =
      rows_in_buffer(x, weights.has_value(), slots.num_slots, layout, peers.buffer().own);
  if (keep) {
    auto& [rows, row_weights] = moved;
    rows = counted_copy(rows, expert_offsets);
    row_weights = counted_copy(row_weights, expert_offsets);
  }
  zero_padding(moved, plan, peers.rank());
  return moved;
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) {
  m.impl("peer_plan", &peer_plan_cuda);
  m.impl("peer_dispatch", &peer_dispatch_cuda);
}

}  // namespace torch_moe_ep
