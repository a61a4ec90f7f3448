#pragma once

#include <ATen/core/Tensor.h>

namespace torch_moe_ep {

// Has the system map the pages of a contiguous CPU tensor that is about to be written, by every
// thread of the intra-op pool. The first write to a fresh page is a fault otherwise: for the 352 MB
// of weight gradients of 8 experts with H = 1024, I = 3584 in fp32 two threads spend 98 to 131 ms
// in faults, or 60 ms here. Values are as they were; where the system cannot (Linux before 5.14),
// nothing happens. Small tensors, whose memory malloc hands out again and again, are left alone.
void take_fresh_pages(const at::Tensor& tensor);

}  // namespace torch_moe_ep
