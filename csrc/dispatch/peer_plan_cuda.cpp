#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "comm/label.h"
#include "comm/peer.h"
#include "common/chunk_sizes.h"
#include "dispatch/dispatch.h"
#include "dispatch/dispatch_cuda.h"
#include "dispatch/peer_dispatch.h"
#include "dispatch/peer_plan_kernels.h"
#include "dispatch/plan_chunks.h"

namespace torch_moe_ep {
namespace {

using PeerPlanTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Copies of each chunk in expert order, without padding, every chunk from place 0.
struct ChunkedPlaces {
  at::Tensor place_of_copy;  // [N]; -1 for an id that no expert has
  at::Tensor place_offsets;  // [C, E + 1]
  at::Tensor counts;         // [C * E]
};

ChunkedPlaces place_in_chunks(const at::Tensor& ids,
                              int64_t num_experts,
                              int64_t num_chunks,
                              const at::Tensor& invalid_flag) {
  ChunkedPlaces placed = {at::empty({ids.numel()}, ids.options()),
                          at::empty({num_chunks, num_experts + 1}, ids.options()),
                          at::empty({num_chunks * num_experts}, ids.options())};
  const int64_t top_k = ids.size(1);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t first = first_token_of(chunk, num_chunks, ids.size(0));
    const int64_t count = first_token_of(chunk + 1, num_chunks, ids.size(0)) - first;
    const Places places = {placed.place_of_copy.narrow(0, first * top_k, count * top_k),
                           placed.place_offsets.select(0, chunk),
                           placed.counts.narrow(0, chunk * num_experts, num_experts)};
    place_copies_into_cuda(ids.narrow(0, first, count), 0, 1, invalid_flag, places);
  }
  return placed;
}

// The first slots of this rank's copies [C, E], and the offsets of its own segments.
std::tuple<at::Tensor, at::Tensor> place_segments(const at::Tensor& counts,
                                                  int64_t rank,
                                                  int64_t row_alignment,
                                                  int64_t capacity,
                                                  const at::Tensor& slots_needed) {
  const int64_t num_chunks = counts.size(0), num_ranks = counts.size(1);
  const int64_t num_experts = counts.size(2);
  const at::Tensor first_slots = at::empty({num_chunks, num_experts}, counts.options());
  const at::Tensor offsets =
      at::empty({num_experts / num_ranks * num_chunks + 1}, counts.options());
  PeerSegments params = {};
  params.counts = counts.const_data_ptr<int64_t>();
  params.num_chunks = static_cast<int>(num_chunks);
  params.num_ranks = static_cast<int>(num_ranks);
  params.num_experts = static_cast<int>(num_experts);
  params.rank = static_cast<int>(rank);
  params.row_alignment = static_cast<int>(row_alignment);
  params.capacity = capacity;
  params.first_slots = first_slots.mutable_data_ptr<int64_t>();
  params.segment_offsets = offsets.mutable_data_ptr<int64_t>();
  params.slots_needed = slots_needed.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(launch_place_segments(params, at::cuda::getCurrentCUDAStream()));
  return {first_slots, offsets};
}

// Turns places in expert order into slots on their owners.
void place_on_owners(const ChunkedPlaces& places,
                     const at::Tensor& ids,
                     const at::Tensor& first_slots,
                     int64_t num_local,
                     int64_t capacity) {
  PeerCopyPlaces params = {};
  params.expert_ids = ids.const_data_ptr<int64_t>();
  params.num_tokens = ids.size(0);
  params.top_k = static_cast<int>(ids.size(1));
  params.num_chunks = static_cast<int>(first_slots.size(0));
  params.num_experts = static_cast<int>(first_slots.size(1));
  params.num_local_experts = static_cast<int>(num_local);
  params.capacity = capacity;
  params.place_offsets = places.place_offsets.const_data_ptr<int64_t>();
  params.first_slots = first_slots.const_data_ptr<int64_t>();
  params.slot_of_copy = places.place_of_copy.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(launch_place_peer_copies(params, at::cuda::getCurrentCUDAStream()));
}

PeerPlanTensors peer_plan_chunks_cuda(const at::Tensor& expert_ids,
                                      int64_t num_experts,
                                      int64_t num_chunks,
                                      int64_t row_alignment,
                                      int64_t max_rows,
                                      int64_t capacity,
                                      const std::string& group_name,
                                      const at::Tensor& invalid_flag,
                                      const at::Tensor& slots_needed) {
  check_plan(expert_ids, num_experts, row_alignment, invalid_flag);
  check_plan_on_cuda(num_experts, row_alignment);
  check_num_chunks(num_chunks, group_name);
  check_peer_plan(num_chunks * num_experts, row_alignment, capacity, slots_needed);
  const c10::cuda::CUDAGuard guard(expert_ids.device());
  const comm::ScopedStage stage("plan");
  comm::PeerGroup& peers = comm::PeerGroup::of(group_name, expert_ids.device());
  check_experts_over_ranks(num_experts, peers.size());
  const at::Tensor ids = expert_ids.contiguous();
  const ChunkedPlaces places = place_in_chunks(ids, num_experts, num_chunks, invalid_flag);
  check_ids_at_once(invalid_flag, group_name);
  const auto [gathered, host_gathered] = peers.gather(places.counts, /*wants_host=*/capacity == 0);
  at::Tensor host_counts = at::empty({0, peers.size(), num_experts}, host_gathered.options());
  if (capacity == 0) {
    host_counts = counts_by_chunk(host_gathered, num_chunks);
    check_max_rows(largest_num_slots(host_counts, row_alignment), max_rows);
  }
  const at::Tensor counts = counts_by_chunk(gathered, num_chunks);
  const auto [first_slots, segment_offsets] =
      place_segments(counts, peers.rank(), row_alignment, capacity, slots_needed);
  place_on_owners(places, ids, first_slots, num_experts / peers.size(), capacity);
  return {places.place_of_copy, segment_offsets, counts, host_counts};
}

PeerPlanTensors peer_plan_cuda(const at::Tensor& expert_ids,
                               int64_t num_experts,
                               int64_t row_alignment,
                               int64_t max_rows,
                               int64_t capacity,
                               const std::string& group_name,
                               const at::Tensor& invalid_flag,
                               const at::Tensor& slots_needed) {
  auto [slot_of_copy, expert_offsets, counts, host_counts] = peer_plan_chunks_cuda(expert_ids,
                                                                                   num_experts,
                                                                                   /*num_chunks=*/1,
                                                                                   row_alignment,
                                                                                   max_rows,
                                                                                   capacity,
                                                                                   group_name,
                                                                                   invalid_flag,
                                                                                   slots_needed);
  // One chunk's [1, P, E], or [0, P, E] where the host does not know it.
  return {slot_of_copy, expert_offsets, counts.flatten(0, 1), host_counts.flatten(0, 1)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) {
  m.impl("peer_plan", &peer_plan_cuda);
  m.impl("peer_plan_chunks", &peer_plan_chunks_cuda);
}

}  // namespace torch_moe_ep
