// peer_combine: results back from the ranks that own their experts, summed over K.
//
// peer_combine(rows [R, H], row_weights [R] fp32 or none, plan) -> x [T, H], weights [T, K] fp32 as
// combine/combine.h says, bit for bit. Each rank puts its results where the others can read them,
// and reads those of its own tokens. Plan: dispatch/peer_dispatch.h. peer_combine is the backward
// of peer_dispatch and peer_dispatch that of peer_combine, whose backward also adds this rank's
// copies per expert to tokens_per_expert (int64 [E]).
//
// Collective over the group (comm/peer.h), no host wait. Deterministic.
#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "combine/combine.h"
#include "combine/gather_rows.h"
#include "combine/peer_kernels.h"
#include "comm/label.h"
#include "comm/peer.h"
#include "common/element_type_of.h"
#include "common/peer_movement.h"

namespace torch_moe_ep {
namespace {

// As many rows as there are, to a place in this rank's buffer.
void put_rows(const at::Tensor& rows,
              const at::Tensor& expert_offsets,
              const comm::SharedMemory& buffer,
              int64_t byte_offset) {
  const at::Tensor dense = rows.contiguous();
  comm::CountedCopy params = {};
  params.source = dense.const_data_ptr();
  params.target = static_cast<char*>(buffer.own.mutable_data_ptr()) + byte_offset;
  params.unit_bytes = (rows.dim() == 2 ? rows.size(1) : 1) * rows.element_size();
  params.num_units = expert_offsets.const_data_ptr<int64_t>() + expert_offsets.numel() - 1;
  params.max_units = rows.size(0);
  C10_CUDA_CHECK(comm::launch_counted_copy(params, at::cuda::getCurrentCUDAStream()));
}

Gathered pull_rows(const at::Tensor& rows,
                   bool has_weights,
                   const PeerPlan& plan,
                   const PeerLayout& layout,
                   const comm::SharedMemory& buffer) {
  const int64_t num_outputs = plan.slot_of_copy.numel() / plan.top_k;
  const auto float_options = rows.options().dtype(at::kFloat);
  Gathered gathered = {at::empty({num_outputs, rows.size(1)}, rows.options()),
                       has_weights ? at::empty({num_outputs, plan.top_k}, float_options)
                                   : at::empty({0}, float_options)};
  PulledRows params = {};
  params.buffers = buffer.on_ranks();
  params.weights_offset = layout.weights_offset;
  params.out = gathered.out.mutable_data_ptr();
  params.weights = has_weights ? gathered.weights.mutable_data_ptr<float>() : nullptr;
  params.slot_of_copy = plan.slot_of_copy.const_data_ptr<int64_t>();
  params.num_outputs = num_outputs;
  params.copies_per_output = static_cast<int>(plan.top_k);
  params.row_elements = rows.size(1);
  params.element_type = element_type_of(rows);
  params.num_sms = static_cast<int>(plan.num_sms);
  C10_CUDA_CHECK(launch_pull_rows(params, at::cuda::getCurrentCUDAStream()));
  return gathered;
}

PeerMoved peer_combine_cuda(const at::Tensor& rows,
                            const std::optional<at::Tensor>& row_weights,
                            const at::Tensor& slot_of_copy,
                            const at::Tensor& expert_offsets,
                            const at::Tensor& counts,
                            const at::Tensor& host_counts,
                            int64_t top_k,
                            int64_t row_alignment,
                            int64_t capacity,
                            int64_t num_sms,
                            const std::string& group_name,
                            const std::optional<at::Tensor>& /*tokens_per_expert*/) {
  const c10::cuda::CUDAGuard guard(rows.device());
  const comm::ScopedStage stage("combine");
  comm::PeerGroup& peers = comm::PeerGroup::of(group_name, rows.device());
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
  check_combine(rows, row_weights, slot_of_copy, slots.num_slots, top_k);
  const PeerLayout layout = peer_layout(slots.room, rows);
  peers.reserve(layout.num_bytes);
  peers.meet();  // nobody reads or writes the buffers for what came before
  put_rows(rows, expert_offsets, peers.buffer(), 0);
  if (row_weights.has_value()) {
    put_rows(*row_weights, expert_offsets, peers.buffer(), layout.weights_offset);
  }
  peers.meet();  // all results are in place
  Gathered gathered = pull_rows(rows, row_weights.has_value(), plan, layout, peers.buffer());
  return {gathered.out, gathered.weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) { m.impl("peer_combine", &peer_combine_cuda); }

}  // namespace torch_moe_ep
