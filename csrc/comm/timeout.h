// How long an exchange may take before it gives up and names ranks.
#pragma once

#include <chrono>

namespace torch_moe_ep::comm {

// What a rank that gives up leaves the others to say the same, before it names those that did not.
inline constexpr std::chrono::milliseconds kTimeToName(3000);

// TORCH_MOE_EP_TIMEOUT_S seconds where that is set, else 0.8 of the backend's own time-out, so that
// the error that names ranks comes before the backend's. The time to name them lies within it, but
// where it would be more than a quarter of it: then it comes on top.
std::chrono::milliseconds timeout_of(std::chrono::milliseconds backend_timeout);

}  // namespace torch_moe_ep::comm
