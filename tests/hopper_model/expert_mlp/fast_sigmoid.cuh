// In the place of csrc's file of this name.
#pragma once

namespace torch_moe_ep {

inline float fast_sigmoid(float) { return 0.5f; }

}  // namespace torch_moe_ep
