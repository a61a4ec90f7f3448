// Sizes and places of a plan's chunks on this rank.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "chunks/chunks.h"
#include "common/exchange_sizes.h"

namespace torch_moe_ep {

class ChunkLayout {
 public:
  // Of host counts alone: nothing is launched.
  explicit ChunkLayout(ChunkPlan plan);

  // Makes what is on the device; apart from the constructor, so that the first chunk leaves before.
  void place(const ChunkDevice& device);

  const ChunkPlan& plan() const { return plan_; }
  int64_t rank() const { return rank_; }
  int64_t num_chunks() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t num_tokens() const { return plan_.slot_of_copy.numel() / plan_.top_k; }
  int64_t first_token(int64_t chunk) const;
  int64_t first_copy(int64_t chunk) const { return first_token(chunk) * plan_.top_k; }
  int64_t num_tokens_of(int64_t chunk) const { return first_token(chunk + 1) - first_token(chunk); }
  const ExchangeSizes& sizes(int64_t chunk) const { return sizes_[chunk]; }
  int64_t num_slots_of_whole() const { return whole_sizes_.num_slots; }

  // After place().
  const at::Tensor& slot_of_received(int64_t chunk) const {
    return places_.slot_of_received[chunk];
  }
  const at::Tensor& whole_of_slot(int64_t chunk) const { return places_.whole_of_slot[chunk]; }
  at::Tensor expert_offsets(int64_t chunk) const { return places_.expert_offsets.select(0, chunk); }
  at::Tensor host_offsets(int64_t chunk) const;
  Padding padding(int64_t chunk) const;
  at::Tensor whole_expert_offsets() const { return expert_offsets(num_chunks()); }
  at::Tensor whole_host_offsets() const;
  Padding whole_padding() const;

 private:
  ChunkPlan plan_;
  int64_t rank_;
  std::vector<ExchangeSizes> sizes_;
  at::Tensor whole_host_counts_;  // [P, E]
  at::Tensor whole_counts_;       // the same on the device
  ExchangeSizes whole_sizes_;
  ChunkPlaces places_;
};

}  // namespace torch_moe_ep
