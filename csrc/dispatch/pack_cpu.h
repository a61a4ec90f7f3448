#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "dispatch/pack_rows.h"

namespace torch_moe_ep {

// rows[slot_of_copy[n]] = source[n / copies_per_source], and likewise the weights [n], on the CPU;
// a slot of -1 is nowhere.
Packed pack_rows_cpu(const at::Tensor& source,
                     const std::optional<at::Tensor>& weights,
                     const at::Tensor& slot_of_copy,
                     int64_t copies_per_source,
                     int64_t num_slots);

}  // namespace torch_moe_ep
