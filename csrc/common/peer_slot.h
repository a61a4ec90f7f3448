#pragma once

#include <cstdint>

// A slot of a rank's rows, as one number. Read by nvcc as well.

namespace torch_moe_ep {

// slot_of_copy of a plan over peers holds owner * 2^40 + slot: rank 2, slot 5 is 2199023255557.
constexpr int kPeerOwnerShift = 40;
constexpr int64_t kPeerSlotMask = (int64_t{1} << kPeerOwnerShift) - 1;

}  // namespace torch_moe_ep
