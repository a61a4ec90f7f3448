// The rows of each local expert, as tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "expert_mlp/row_segments.h"

namespace torch_moe_ep {

// RowSegments says what the numbers mean.
struct ExpertSegments {
  at::Tensor offsets;       // int64 [L * stride + 1], on the device of the rows
  at::Tensor host_offsets;  // the same on the CPU, or [0] where the host does not know them
  int64_t stride = 1;
  int64_t first = 0;
  int64_t span = 1;

  int64_t num_experts() const { return (offsets.numel() - 1) / stride; }
  bool has_all_rows() const { return span == stride; }
  bool is_known_to_host() const { return host_offsets.numel() > 0; }
  RowSegments between(const int64_t* their_offsets) const {
    return {
        their_offsets, static_cast<int>(stride), static_cast<int>(first), static_cast<int>(span)};
  }
};

// Of offsets of all experts' segments of C chunks, the rows of all chunks, or of one.
inline ExpertSegments all_chunks(const at::Tensor& offsets,
                                 const at::Tensor& host_offsets,
                                 int64_t num_chunks) {
  return {offsets.contiguous(), host_offsets.contiguous(), num_chunks, 0, num_chunks};
}
inline ExpertSegments one_chunk(const at::Tensor& offsets,
                                const at::Tensor& host_offsets,
                                int64_t num_chunks,
                                int64_t chunk) {
  return {offsets.contiguous(), host_offsets.contiguous(), num_chunks, chunk, 1};
}

}  // namespace torch_moe_ep
