// How long an exchange may take before it gives up and names ranks.
#pragma once

#include <chrono>

namespace torch_moe_ep::comm {

// TORCH_MOE_EP_TIMEOUT_S seconds where that is set, else 0.8 of the backend's own time-out, so that
// the error that names ranks comes before the backend's.
std::chrono::milliseconds timeout_of(std::chrono::milliseconds backend_timeout);

}  // namespace torch_moe_ep::comm
