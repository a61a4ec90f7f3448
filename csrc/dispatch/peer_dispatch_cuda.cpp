#include "dispatch/peer_dispatch.h"

#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "comm/label.h"
#include "comm/peer.h"
#include "common/peer_region.h"
#include "dispatch/dispatch.h"
#include "dispatch/dispatch_cuda.h"
#include "dispatch/peer_kernels.h"
#include "dispatch/peer_rows.h"
#include "movement/peer_movement.h"

namespace torch_moe_ep {

void push_rows_cuda(const Source& tokens,
                    const PeerRegion& region,
                    void* const* buffers,
                    int64_t num_sms) {
  PushedRows params = {};
  params.source = tokens.rows.const_data_ptr();
  params.weights = tokens.weights.defined() ? tokens.weights.const_data_ptr<float>() : nullptr;
  params.buffers = buffers;
  params.rows_offset = region.rows_offset;
  params.weights_offset = region.weights_offset;
  params.slot_of_copy = tokens.slot_of_copy.const_data_ptr<int64_t>();
  params.num_sources = tokens.rows.size(0);
  params.copies_per_source = static_cast<int>(tokens.copies_per_source);
  params.row_bytes = region.row_bytes;
  params.num_sms = static_cast<int>(num_sms);
  C10_CUDA_CHECK(launch_push_rows(params, at::cuda::getCurrentCUDAStream()));
}

void zero_padding_cuda(const Packed& rows,
                       const at::Tensor& segment_offsets,
                       const at::Tensor& counts,
                       int64_t rank) {
  SegmentPadding params = {};
  params.rows = rows.rows.mutable_data_ptr();
  if (rows.row_weights.numel() > 0) {
    params.row_weights = rows.row_weights.mutable_data_ptr<float>();
  }
  params.row_bytes = rows.rows.size(1) * static_cast<int64_t>(rows.rows.element_size());
  params.segment_offsets = segment_offsets.const_data_ptr<int64_t>();
  params.counts = counts.const_data_ptr<int64_t>();
  params.num_chunks = static_cast<int>(counts.size(0));
  params.num_ranks = static_cast<int>(counts.size(1));
  params.num_experts = static_cast<int>(counts.size(2));
  params.num_local_experts = static_cast<int>(counts.size(2) / counts.size(1));
  params.rank = static_cast<int>(rank);
  C10_CUDA_CHECK(launch_zero_padding(params, at::cuda::getCurrentCUDAStream()));
}

namespace {

// Rows in the buffer of this rank.
PeerMoved rows_in_buffer(const at::Tensor& x,
                         bool has_weights,
                         int64_t num_slots,
                         const PeerRegion& region,
                         const at::Tensor& buffer) {
  return {region.rows(buffer, num_slots, x), region.weights(buffer, has_weights ? num_slots : 0)};
}

at::Tensor copied(const at::Tensor& rows, const at::Tensor& expert_offsets) {
  const at::Tensor copy = at::empty(rows.sizes(), rows.options());
  comm::copy_rows(rows, copy.mutable_data_ptr(), expert_offsets);
  return copy;
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
  const PeerRegion region = PeerRegion::from(0, slots.room, x);
  peers.reserve(region.end);
  const comm::SharedMemory& buffer = peers.buffer();
  peers.meet();  // nobody reads or writes the buffers for what came before
  push_rows_cuda(
      {x.contiguous(), weights ? weights->contiguous() : at::Tensor(), slot_of_copy, top_k},
      region,
      buffer.on_ranks(),
      num_sms);
  peers.meet();  // all rows have come
  auto [rows, row_weights] =
      rows_in_buffer(x, weights.has_value(), slots.num_slots, region, buffer.own);
  if (keep) {
    rows = copied(rows, expert_offsets);
    row_weights = copied(row_weights, expert_offsets);
  }
  zero_padding_cuda({rows, row_weights}, expert_offsets, counts.unsqueeze(0), peers.rank());
  return {rows, row_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) { m.impl("peer_dispatch", &peer_dispatch_cuda); }

}  // namespace torch_moe_ep
