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
#include "combine/peer_rows.h"
#include "comm/label.h"
#include "comm/peer.h"
#include "common/element_type_of.h"
#include "common/peer_region.h"
#include "movement/peer_movement.h"

namespace torch_moe_ep {

void pull_rows_cuda(const Gathered& into,
                    const at::Tensor& slot_of_copy,
                    int64_t copies_per_output,
                    const PeerRegion& region,
                    void* const* buffers,
                    int64_t num_sms) {
  PulledRows params = {};
  params.buffers = buffers;
  params.rows_offset = region.rows_offset;
  params.weights_offset = region.weights_offset;
  params.out = into.out.mutable_data_ptr();
  if (into.weights.numel() > 0) params.weights = into.weights.mutable_data_ptr<float>();
  params.slot_of_copy = slot_of_copy.const_data_ptr<int64_t>();
  params.num_outputs = into.out.size(0);
  params.copies_per_output = static_cast<int>(copies_per_output);
  params.row_elements = into.out.size(1);
  params.element_type = element_type_of(into.out);
  params.num_sms = static_cast<int>(num_sms);
  C10_CUDA_CHECK(launch_pull_rows(params, at::cuda::getCurrentCUDAStream()));
}

namespace {

// As many rows as there are, to their place in this rank's buffer.
void put_rows(const at::Tensor& rows,
              const at::Tensor& expert_offsets,
              const comm::SharedMemory& buffer,
              int64_t byte_offset) {
  auto* target = static_cast<char*>(buffer.own.mutable_data_ptr()) + byte_offset;
  comm::copy_rows(rows.contiguous(), target, expert_offsets);
}

// Sums to be, and weights where rows have some.
Gathered empty_outputs(const at::Tensor& rows, bool has_weights, int64_t num_outputs, int64_t k) {
  const auto float_options = rows.options().dtype(at::kFloat);
  return {at::empty({num_outputs, rows.size(1)}, rows.options()),
          has_weights ? at::empty({num_outputs, k}, float_options) : at::empty({0}, float_options)};
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
  const PeerRegion region = PeerRegion::from(0, slots.room, rows);
  peers.reserve(region.end);
  peers.meet();  // nobody reads or writes the buffers for what came before
  put_rows(rows, expert_offsets, peers.buffer(), region.rows_offset);
  if (row_weights.has_value()) {
    put_rows(*row_weights, expert_offsets, peers.buffer(), region.weights_offset);
  }
  peers.meet();  // all results are in place
  const Gathered gathered =
      empty_outputs(rows, row_weights.has_value(), slot_of_copy.numel() / top_k, top_k);
  pull_rows_cuda(gathered, slot_of_copy, top_k, region, peers.buffer().on_ranks(), num_sms);
  return {gathered.out, gathered.weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) { m.impl("peer_combine", &peer_combine_cuda); }

}  // namespace torch_moe_ep
