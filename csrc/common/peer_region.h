#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace torch_moe_ep {

// Where rows [room, H] and their weights fp32 [room] lie in the peers' buffer, the same on every
// rank; bytes from its start, for 16-byte accesses.
struct PeerRegion {
  int64_t row_bytes;
  int64_t rows_offset;
  int64_t weights_offset;
  int64_t end;

  // room: slots of the rank that has most.
  static PeerRegion from(int64_t first_byte, int64_t room, const at::Tensor& rows) {
    constexpr int64_t kAlignment = 256;
    const int64_t row_bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
    const auto align = [](int64_t bytes) {
      return (bytes + kAlignment - 1) / kAlignment * kAlignment;
    };
    const int64_t weights_offset = align(first_byte + room * row_bytes);
    const int64_t num_bytes_of_weights = room * static_cast<int64_t>(sizeof(float));
    return {row_bytes, first_byte, weights_offset, align(weights_offset + num_bytes_of_weights)};
  }

  // In a rank's own buffer, which outlives them.
  at::Tensor rows(const at::Tensor& buffer, int64_t num_slots, const at::Tensor& like) const {
    const at::Tensor bytes = buffer.narrow(0, rows_offset, num_slots * row_bytes);
    return bytes.view(like.scalar_type()).view({num_slots, like.size(1)});
  }
  at::Tensor weights(const at::Tensor& buffer, int64_t num_slots) const {
    const int64_t num_bytes = num_slots * static_cast<int64_t>(sizeof(float));
    return buffer.narrow(0, weights_offset, num_bytes).view(at::kFloat);
  }
};

}  // namespace torch_moe_ep
