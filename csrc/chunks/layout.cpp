#include "chunks/layout.h"

#include <utility>

#include "comm/collective.h"
#include "common/chunk_sizes.h"
#include "dispatch/dispatch.h"

namespace torch_moe_ep {

ChunkLayout::ChunkLayout(ChunkPlan plan)
    : plan_(std::move(plan)), rank_(comm::group_rank(plan_.group_name)) {
  const at::Tensor& host_counts = plan_.host_counts;
  TORCH_CHECK_VALUE(plan_.top_k > 0 && host_counts.dim() == 3 && host_counts.size(0) > 0,
                    "host_counts must be [chunks, ranks, experts] of plan_chunks, got shape ",
                    host_counts.sizes());
  for (int64_t chunk = 0; chunk < host_counts.size(0); ++chunk) {
    sizes_.push_back(exchange_sizes(host_counts.select(0, chunk), rank_, plan_.row_alignment));
  }
  whole_host_counts_ = host_counts.sum(0);
  whole_sizes_ = exchange_sizes(whole_host_counts_, rank_, plan_.row_alignment);
}

void ChunkLayout::place(const ChunkDevice& device) {
  whole_counts_ = plan_.counts.sum(0);
  places_ = device.place_chunks(plan_.counts, sizes_, rank_, plan_.row_alignment);
}

int64_t ChunkLayout::first_token(int64_t chunk) const {
  return first_token_of(chunk, num_chunks(), num_tokens());
}

at::Tensor ChunkLayout::host_offsets(int64_t chunk) const {
  return plan_host_offsets(
      plan_.host_counts.select(0, chunk), plan_.row_alignment, plan_.group_name);
}

Padding ChunkLayout::padding(int64_t chunk) const {
  return {expert_offsets(chunk), plan_.counts.select(0, chunk), rank_, plan_.row_alignment};
}

at::Tensor ChunkLayout::whole_host_offsets() const {
  return plan_host_offsets(whole_host_counts_, plan_.row_alignment, plan_.group_name);
}

Padding ChunkLayout::whole_padding() const {
  return {whole_expert_offsets(), whole_counts_, rank_, plan_.row_alignment};
}

}  // namespace torch_moe_ep
