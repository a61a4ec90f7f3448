// Rows of copies back to their outputs: what combine does to memory, on either device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace torch_moe_ep {

struct Gathered {
  at::Tensor out;      // [num_outputs, H]
  at::Tensor weights;  // [num_outputs, copies_per_output] fp32, or [0] without row weights
};

// out[t] = sum over k of rows[slot_of_copy[t * copies_per_output + k]], added in fp32 in ascending
// k and rounded once; a slot of -1 adds nothing and has weight 0. With one copy an output the row's
// bits are kept. float32, bfloat16 and float16.
Gathered gather_rows_cpu(const at::Tensor& rows,
                         const std::optional<at::Tensor>& row_weights,
                         const at::Tensor& slot_of_copy,
                         int64_t copies_per_output);
// The same on the current stream; at most 32 copies an output.
Gathered gather_rows_cuda(const at::Tensor& rows,
                          const std::optional<at::Tensor>& row_weights,
                          const at::Tensor& slot_of_copy,
                          int64_t copies_per_output);

}  // namespace torch_moe_ep
