#include <ATen/Functions.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "comm/collective.h"
#include "comm/label.h"
#include "common/chunk_sizes.h"
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

// First slots of a chunk's runs, and of the same rows in the whole: [L][P] each.
struct Runs {
  std::vector<int64_t> first_slot;
  std::vector<int64_t> first_whole;
};

// own [C, P, L]: rows of each chunk from each rank for each local expert.
Runs runs_of(const at::Tensor& own,
             int64_t chunk,
             const std::vector<int64_t>& offsets,
             const std::vector<int64_t>& whole_offsets) {
  const auto count = own.accessor<int64_t, 3>();
  Runs runs;
  for (int64_t l = 0; l < own.size(2); ++l) {
    int64_t slot = offsets[l];
    int64_t whole = whole_offsets[l];
    for (int64_t source = 0; source < own.size(1); ++source) {
      runs.first_slot.push_back(slot);
      slot += count[chunk][source][l];
      for (int64_t other = 0; other < own.size(0); ++other) {
        if (other == chunk) runs.first_whole.push_back(whole);
        whole += count[other][source][l];
      }
    }
  }
  return runs;
}

}  // namespace

ChunkPlaces place_chunks_cpu(const at::Tensor& counts,
                             const std::vector<ExchangeSizes>& sizes,
                             int64_t rank,
                             int64_t row_alignment) {
  const int64_t num_chunks = counts.size(0), num_ranks = counts.size(1);
  const int64_t num_local = counts.size(2) / num_ranks;
  const at::Tensor own = counts.narrow(2, rank * num_local, num_local);
  const auto count = own.accessor<int64_t, 3>();
  const auto whole_offsets = local_offsets(counts.sum(0), rank, row_alignment);
  ChunkPlaces places;
  std::vector<at::Tensor> expert_offsets;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const auto offsets = local_offsets(counts.select(0, chunk), rank, row_alignment);
    const Runs runs = runs_of(own, chunk, offsets, whole_offsets);
    const at::Tensor slot_of_received = at::empty({sizes[chunk].num_received}, counts.options());
    const at::Tensor whole_of_slot = at::full({sizes[chunk].num_slots}, -1, counts.options());
    int64_t* slot = slot_of_received.mutable_data_ptr<int64_t>();
    int64_t* whole = whole_of_slot.mutable_data_ptr<int64_t>();
    for (int64_t source = 0; source < num_ranks; ++source) {
      for (int64_t l = 0; l < num_local; ++l) {
        const int64_t run = l * num_ranks + source;
        for (int64_t i = 0; i < count[chunk][source][l]; ++i) {
          *slot++ = runs.first_slot[run] + i;
          whole[runs.first_slot[run] + i] = runs.first_whole[run] + i;
        }
      }
    }
    places.slot_of_received.push_back(slot_of_received);
    places.whole_of_slot.push_back(whole_of_slot);
    expert_offsets.push_back(at::tensor(offsets, counts.options()));
  }
  expert_offsets.push_back(at::tensor(whole_offsets, counts.options()));
  places.expert_offsets = at::stack(expert_offsets);
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
  const int64_t rank = comm::group_rank(group_name);
  check_max_rows(exchange_sizes(counts.sum(0), rank, row_alignment).largest_num_slots, max_rows);
  return {slot_of_copy, counts, counts.clone(), sent.rows, sent.row_weights};
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CPU, m) { m.impl("plan_chunks", &plan_chunks_cpu); }

}  // namespace torch_moe_ep
