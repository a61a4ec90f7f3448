#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "comm/collective.h"
#include "comm/label.h"
#include "common/chunk_sizes.h"
#include "common/segments.h"
#include "dispatch/dispatch.h"
#include "dispatch/pack_cpu.h"
#include "dispatch/plan_chunks.h"
#include "dispatch/plan_cpu.h"

namespace torch_moe_ep {
namespace {

// The ids of one chunk, and the row of the send buffer where it begins.
struct Chunk {
  at::Tensor ids;
  int64_t first_row;
};

std::vector<Chunk> cut(const at::Tensor& ids, int64_t num_chunks) {
  std::vector<Chunk> chunks;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t first = first_token_of(chunk, num_chunks, ids.size(0));
    const int64_t end = first_token_of(chunk + 1, num_chunks, ids.size(0));
    chunks.push_back({ids.narrow(0, first, end - first), first * ids.size(1)});
  }
  return chunks;
}

// [C * E + 1]: copies of each chunk for each expert, and ids that no expert has.
at::Tensor count_chunks(const std::vector<Chunk>& chunks, int64_t num_experts) {
  const auto num_chunks = static_cast<int64_t>(chunks.size());
  const at::Tensor row = at::zeros({num_chunks * num_experts + 1}, chunks[0].ids.options());
  at::Tensor num_invalid = row.select(0, num_chunks * num_experts);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const at::Tensor counts = count_copies(chunks[chunk].ids, num_experts);
    row.narrow(0, chunk * num_experts, num_experts).copy_(counts.narrow(0, 0, num_experts));
    num_invalid.add_(counts.select(0, num_experts));
  }
  return row;
}

at::Tensor place_copies_of(const std::vector<Chunk>& chunks,
                           const int64_t* counts,
                           int64_t num_experts) {
  std::vector<at::Tensor> slots;
  for (const Chunk& chunk : chunks) {
    auto next_slot = offsets_of(counts, num_experts, 1);
    for (int64_t& slot : next_slot) slot += chunk.first_row;
    slots.push_back(place_copies(chunk.ids, std::move(next_slot)));
    counts += num_experts;
  }
  return at::cat(slots);
}

}  // namespace

int64_t largest_num_slots(const at::Tensor& host_counts, int64_t row_alignment) {
  const auto count = host_counts.accessor<int64_t, 3>();
  const int64_t num_ranks = host_counts.size(1), num_local = host_counts.size(2) / num_ranks;
  std::vector<int64_t> num_slots(num_ranks, 0);
  for (int64_t chunk = 0; chunk < host_counts.size(0); ++chunk) {
    for (int64_t expert = 0; expert < host_counts.size(2); ++expert) {
      int64_t rows = 0;
      for (int64_t source = 0; source < num_ranks; ++source) rows += count[chunk][source][expert];
      num_slots[expert / num_local] += round_up(rows, row_alignment);
    }
  }
  return *std::max_element(num_slots.begin(), num_slots.end());
}

at::Tensor segment_offsets_of(const at::Tensor& host_counts, int64_t rank, int64_t row_alignment) {
  const auto count = host_counts.accessor<int64_t, 3>();
  const int64_t num_chunks = host_counts.size(0), num_ranks = host_counts.size(1);
  const int64_t num_local = host_counts.size(2) / num_ranks;
  std::vector<int64_t> lengths;
  for (int64_t l = 0; l < num_local; ++l) {
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      int64_t& length = lengths.emplace_back(0);
      for (int64_t source = 0; source < num_ranks; ++source) {
        length += count[chunk][source][rank * num_local + l];
      }
    }
  }
  return at::tensor(offsets_of(lengths.data(), num_local * num_chunks, row_alignment),
                    host_counts.options());
}

ChunkPlaces place_chunks_cpu(const at::Tensor& counts,
                             const std::vector<ExchangeSizes>& /*sizes*/,
                             int64_t rank,
                             int64_t row_alignment) {
  const int64_t num_chunks = counts.size(0);
  ChunkPlaces places = {segment_offsets_of(counts, rank, row_alignment), {}};
  const int64_t* offsets = places.segment_offsets.const_data_ptr<int64_t>();
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    std::vector<int64_t> next_slot;
    for (int64_t s = chunk; s + 1 < places.segment_offsets.numel(); s += num_chunks) {
      next_slot.push_back(offsets[s]);
    }
    places.slot_of_received.push_back(
        place_received(counts.select(0, chunk), rank, std::move(next_slot)));
  }
  return places;
}

ChunkPlanTensors plan_chunks_cpu(const at::Tensor& expert_ids,
                                 int64_t num_experts,
                                 int64_t num_chunks,
                                 int64_t row_alignment,
                                 int64_t max_rows,
                                 const std::string& group_name,
                                 const at::Tensor& invalid_flag,
                                 const std::optional<at::Tensor>& x,
                                 const std::optional<at::Tensor>& weights) {
  check_plan(expert_ids, num_experts, row_alignment, invalid_flag);
  check_num_chunks(num_chunks, group_name);
  check_experts_over_ranks(num_experts, comm::group_size(group_name));
  const comm::ScopedStage stage("plan");
  const auto chunks = cut(expert_ids.contiguous(), num_chunks);
  const at::Tensor own_counts = count_chunks(chunks, num_experts);
  const int64_t* counts_of_own = own_counts.const_data_ptr<int64_t>();
  const int64_t num_numbers = num_chunks * num_experts;
  comm::CountExchange exchange(own_counts, group_name);
  at::Tensor slot_of_copy;
  const auto float_options = expert_ids.options().dtype(at::kFloat);
  Packed sent = {at::empty({0, 0}, float_options), at::empty({0}, float_options)};
  if (counts_of_own[num_numbers] == 0) {  // else every rank raises below
    slot_of_copy = place_copies_of(chunks, counts_of_own, num_experts);
    if (x.has_value()) {
      check_dispatch(*x, weights, slot_of_copy, expert_ids.size(1));
      sent = pack_rows_cpu(*x, weights, slot_of_copy, expert_ids.size(1), expert_ids.numel());
    }
  }
  const at::Tensor gathered = exchange.wait().counts;
  check_ids(gathered.select(1, num_numbers), num_experts);
  const at::Tensor counts = counts_by_chunk(gathered.narrow(1, 0, num_numbers), num_chunks);
  check_max_rows(largest_num_slots(counts, row_alignment), max_rows);
  return {slot_of_copy, counts, counts.clone(), sent.rows, sent.row_weights};
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CPU, m) { m.impl("plan_chunks", &plan_chunks_cpu); }

}  // namespace torch_moe_ep
