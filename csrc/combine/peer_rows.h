// What peer_combine and chunks over peers read from the peers' buffers, on the current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "combine/gather_rows.h"
#include "common/peer_region.h"

namespace torch_moe_ep {

// The sums of gather_rows over rows on their owners; slot_of_copy names owner and slot. Into
// weights [T, K] unless they are [0].
void pull_rows_cuda(const Gathered& into,
                    const at::Tensor& slot_of_copy,
                    int64_t copies_per_output,
                    const PeerRegion& region,
                    void* const* buffers,
                    int64_t num_sms);

}  // namespace torch_moe_ep
