#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace torch_moe_ep {

struct PackedRows {
  at::Tensor rows;         // [num_slots, H]
  at::Tensor row_weights;  // [num_slots] fp32, or [0]
};

// rows[slot_of_copy[n]] = source[n / copies_per_source], and likewise the weights [n], on the CPU.
PackedRows pack_rows_cpu(const at::Tensor& source,
                         const std::optional<at::Tensor>& weights,
                         const at::Tensor& slot_of_copy,
                         int64_t copies_per_source,
                         int64_t num_slots);

}  // namespace torch_moe_ep
