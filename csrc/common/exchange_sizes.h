#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

namespace torch_moe_ep {

// What one rank sends, receives and lays out, computed on the host from the gathered counts.
struct ExchangeSizes {
  std::vector<int64_t> send_rows;      // [P] rows for each rank
  std::vector<int64_t> received_rows;  // [P] rows from each rank
  int64_t num_sent = 0;
  int64_t num_received = 0;
  int64_t num_slots = 0;          // R of this rank
  int64_t largest_num_slots = 0;  // R of the rank that has most
};

// host_counts int64 [P, E] on the CPU: copies that each source rank sends to each expert.
inline ExchangeSizes exchange_sizes(const at::Tensor& host_counts,
                                    int64_t rank,
                                    int64_t row_alignment) {
  const int64_t num_ranks = host_counts.size(0);
  const int64_t num_experts = host_counts.size(1);
  const int64_t num_local = num_experts / num_ranks;
  const int64_t* counts = host_counts.const_data_ptr<int64_t>();
  ExchangeSizes sizes;
  sizes.send_rows.assign(num_ranks, 0);
  sizes.received_rows.assign(num_ranks, 0);
  for (int64_t owner = 0; owner < num_ranks; ++owner) {
    int64_t num_slots = 0;
    for (int64_t expert = owner * num_local; expert < (owner + 1) * num_local; ++expert) {
      int64_t length = 0;
      for (int64_t source = 0; source < num_ranks; ++source) {
        const int64_t count = counts[source * num_experts + expert];
        length += count;
        if (source == rank) sizes.send_rows[owner] += count;
        if (owner == rank) sizes.received_rows[source] += count;
      }
      num_slots += (length + row_alignment - 1) / row_alignment * row_alignment;
    }
    if (owner == rank) sizes.num_slots = num_slots;
    sizes.largest_num_slots = std::max(sizes.largest_num_slots, num_slots);
  }
  const auto sum = [](const std::vector<int64_t>& rows) {
    return std::accumulate(rows.begin(), rows.end(), int64_t{0});
  };
  sizes.num_sent = sum(sizes.send_rows);
  sizes.num_received = sum(sizes.received_rows);
  return sizes;
}

// What is absent is an undefined tensor among several that travel.
inline std::optional<at::Tensor> given(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace torch_moe_ep
