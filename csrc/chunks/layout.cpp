#include "chunks/layout.h"

#include <utility>

#include "comm/collective.h"
#include "common/chunk_sizes.h"

namespace torch_moe_ep {

ChunkLayout::ChunkLayout(ChunkPlan plan)
    : plan_(std::move(plan)), rank_(comm::group_rank(plan_.group_name)) {
  const at::Tensor& host_counts = plan_.host_counts;
  TORCH_CHECK_VALUE(plan_.top_k > 0 && host_counts.dim() == 3 && host_counts.size(0) > 0,
                    "host_counts must be [chunks, ranks, experts] of plan_chunks, got shape ",
                    host_counts.sizes());
  segments_ = {host_counts.size(0), 0, {}, {}};
  for (int64_t chunk = 0; chunk < num_chunks(); ++chunk) {
    sizes_.push_back(exchange_sizes(host_counts.select(0, chunk), rank_, plan_.row_alignment));
    segments_.num_slots += sizes_.back().num_slots;
  }
  segments_.host_offsets = segment_offsets_of(host_counts, rank_, plan_.row_alignment);
}

void ChunkLayout::place(const ChunkDevice& device) {
  ChunkPlaces places = device.place_chunks(plan_.counts, sizes_, rank_, plan_.row_alignment);
  segments_.offsets = std::move(places.segment_offsets);
  slot_of_received_ = std::move(places.slot_of_received);
}

int64_t ChunkLayout::first_token(int64_t chunk) const {
  return first_token_of(chunk, num_chunks(), num_tokens());
}

Padding ChunkLayout::padding(int64_t chunk) const {
  return {segments_.offsets,
          plan_.counts.select(0, chunk),
          rank_,
          plan_.row_alignment,
          num_chunks(),
          chunk};
}

}  // namespace torch_moe_ep
