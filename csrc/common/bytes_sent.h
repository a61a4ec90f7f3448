#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

namespace torch_moe_ep {

// What leaves this rank's node, in bytes: an int64 [2] tensor on the CPU that operators add to,
// rows apart from what goes with them (expert ids and router weights, 4 bytes each). Nobody counts
// without one.
inline void add_bytes_sent(const std::optional<at::Tensor>& bytes_sent,
                           int64_t bytes_of_rows,
                           int64_t bytes_of_ids_and_weights) {
  if (!bytes_sent.has_value()) return;
  TORCH_CHECK_VALUE(bytes_sent->device().is_cpu() && bytes_sent->scalar_type() == at::kLong &&
                        bytes_sent->numel() == 2 && bytes_sent->is_contiguous(),
                    "bytes_sent must be int64 [2] on the CPU, got ",
                    bytes_sent->scalar_type(),
                    " ",
                    bytes_sent->sizes(),
                    " on ",
                    bytes_sent->device());
  auto* counter = bytes_sent->mutable_data_ptr<int64_t>();
  counter[0] += bytes_of_rows;
  counter[1] += bytes_of_ids_and_weights;
}

}  // namespace torch_moe_ep
