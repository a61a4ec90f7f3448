// What peer_dispatch and chunks over peers do to the peers' buffer, on the current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "common/peer_region.h"
#include "dispatch/pack_rows.h"

namespace torch_moe_ep {

// Each row of tokens into the buffers of its copies' owners, and the weights of copies where there
// are any; slot_of_copy names owner and slot (common/peer_slot.h).
void push_rows_cuda(const Source& tokens,
                    const PeerRegion& region,
                    void* const* buffers,
                    int64_t num_sms);

// Zeros at the end of each segment of this rank: segment_offsets [L * C + 1], counts [C, P, E].
void zero_padding_cuda(const Packed& rows,
                       const at::Tensor& segment_offsets,
                       const at::Tensor& counts,
                       int64_t rank);

}  // namespace torch_moe_ep
