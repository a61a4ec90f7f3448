#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "comm/collective.h"
#include "comm/label.h"
#include "common/chunk_sizes.h"
#include "dispatch/dispatch.h"
#include "dispatch/dispatch_cuda.h"
#include "dispatch/dispatch_kernels.h"
#include "dispatch/pack_rows.h"
#include "dispatch/plan_chunks.h"

namespace torch_moe_ep {
namespace {

struct ChunkedCopies {
  at::Tensor slot_of_copy;  // [N]
  at::Tensor counts;        // [C * E]
};

// Send order is chunk by chunk, inside a chunk expert order without padding.
ChunkedCopies place_copies(const at::Tensor& ids,
                           int64_t num_experts,
                           int64_t num_chunks,
                           const at::Tensor& invalid_flag) {
  ChunkedCopies placed = {at::empty({ids.numel()}, ids.options()),
                          at::empty({num_chunks * num_experts}, ids.options())};
  const int64_t top_k = ids.size(1);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t first = first_token_of(chunk, num_chunks, ids.size(0));
    const int64_t count = first_token_of(chunk + 1, num_chunks, ids.size(0)) - first;
    const Places places = {placed.slot_of_copy.narrow(0, first * top_k, count * top_k),
                           at::Tensor(),
                           placed.counts.narrow(0, chunk * num_experts, num_experts)};
    place_copies_into_cuda(ids.narrow(0, first, count), first * top_k, 1, invalid_flag, places);
  }
  return placed;
}

Packed pack_tokens(const at::Tensor& x,
                   const std::optional<at::Tensor>& weights,
                   const at::Tensor& slot_of_copy,
                   int64_t top_k) {
  check_dispatch(x, weights, slot_of_copy, top_k);
  check_top_k_on_cuda(top_k);
  const at::Tensor dense_weights = weights ? weights->contiguous() : at::Tensor();
  return pack_rows_cuda(
      {x.contiguous(), dense_weights, slot_of_copy, top_k}, slot_of_copy.numel(), nullptr);
}

}  // namespace

ChunkPlaces place_chunks_cuda(const at::Tensor& counts,
                              const std::vector<ExchangeSizes>& sizes,
                              int64_t rank,
                              int64_t row_alignment) {
  const int64_t num_chunks = counts.size(0), num_local = counts.size(2) / counts.size(1);
  std::vector<int64_t> num_received;
  num_received.reserve(sizes.size());
  for (const ExchangeSizes& chunk : sizes) num_received.push_back(chunk.num_received);
  const int64_t total = std::accumulate(num_received.begin(), num_received.end(), int64_t{0});
  const at::Tensor slot_of_received = at::empty({total}, counts.options());
  const at::Tensor segment_offsets = at::empty({num_local * num_chunks + 1}, counts.options());
  ChunkReceivedPlaces params = {};
  params.counts = counts.const_data_ptr<int64_t>();
  params.num_chunks = static_cast<int>(num_chunks);
  params.num_ranks = static_cast<int>(counts.size(1));
  params.num_experts = static_cast<int>(counts.size(2));
  params.rank = static_cast<int>(rank);
  params.row_alignment = static_cast<int>(row_alignment);
  params.slot_of_received = slot_of_received.mutable_data_ptr<int64_t>();
  params.segment_offsets = segment_offsets.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(launch_place_chunks(params, at::cuda::getCurrentCUDAStream()));
  return {segment_offsets, slot_of_received.split_with_sizes(num_received)};
}

ChunkPlanTensors plan_chunks_cuda(const at::Tensor& expert_ids,
                                  int64_t num_experts,
                                  int64_t num_chunks,
                                  int64_t row_alignment,
                                  int64_t max_rows,
                                  const std::string& group_name,
                                  const at::Tensor& invalid_flag,
                                  const std::optional<at::Tensor>& x,
                                  const std::optional<at::Tensor>& weights) {
  check_plan(expert_ids, num_experts, row_alignment, invalid_flag);
  check_plan_on_cuda(num_experts, row_alignment);
  check_num_chunks(num_chunks, group_name);
  check_experts_over_ranks(num_experts, comm::group_size(group_name));
  const c10::cuda::CUDAGuard guard(expert_ids.device());
  const comm::ScopedStage stage("plan");
  const at::Tensor ids = expert_ids.contiguous();
  const ChunkedCopies copies = place_copies(ids, num_experts, num_chunks, invalid_flag);
  check_ids_at_once(invalid_flag, group_name);
  comm::CountExchange exchange(copies.counts, group_name);
  const auto float_options = ids.options().dtype(at::kFloat);
  Packed sent = {at::empty({0, 0}, float_options), at::empty({0}, float_options)};
  if (x.has_value()) sent = pack_tokens(*x, weights, copies.slot_of_copy, ids.size(1));
  // The one host wait of a layer's forward.
  const auto [gathered, host_gathered] = exchange.wait();
  const at::Tensor host_counts = counts_by_chunk(host_gathered, num_chunks);
  check_max_rows(largest_num_slots(host_counts, row_alignment), max_rows);
  return {copies.slot_of_copy,
          counts_by_chunk(gathered, num_chunks),
          host_counts,
          sent.rows,
          sent.row_weights};
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) { m.impl("plan_chunks", &plan_chunks_cuda); }

}  // namespace torch_moe_ep
