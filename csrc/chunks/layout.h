// Sizes and places of a plan's chunks on this rank, for transports that wait for the counts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "chunks/chunks.h"
#include "chunks/segments.h"
#include "common/exchange_sizes.h"

namespace torch_moe_ep {

class ChunkLayout {
 public:
  // Of host counts alone: nothing is launched.
  explicit ChunkLayout(ChunkPlan plan);

  // Makes what is on the device; apart from the constructor, so that the first chunk leaves before.
  void place(const ChunkDevice& device);

  const ChunkPlan& plan() const { return plan_; }
  int64_t num_chunks() const { return segments_.num_chunks; }
  int64_t num_tokens() const { return plan_.slot_of_copy.numel() / plan_.top_k; }
  int64_t first_token(int64_t chunk) const;
  int64_t first_copy(int64_t chunk) const { return first_token(chunk) * plan_.top_k; }
  int64_t num_tokens_of(int64_t chunk) const { return first_token(chunk + 1) - first_token(chunk); }
  const ExchangeSizes& sizes(int64_t chunk) const { return sizes_[chunk]; }
  // The offsets on the device are there after place().
  const ChunkSegments& segments() const { return segments_; }

  // After place().
  const at::Tensor& slot_of_received(int64_t chunk) const { return slot_of_received_[chunk]; }
  Padding padding(int64_t chunk) const;

 private:
  ChunkPlan plan_;
  int64_t rank_;
  std::vector<ExchangeSizes> sizes_;
  ChunkSegments segments_;
  std::vector<at::Tensor> slot_of_received_;
};

}  // namespace torch_moe_ep
