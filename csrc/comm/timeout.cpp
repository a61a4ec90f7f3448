#include "comm/timeout.h"

#include <c10/util/Exception.h>
#include <c10/util/env.h>

#include <charconv>
#include <chrono>
#include <cstdint>

namespace torch_moe_ep::comm {
namespace {

std::chrono::milliseconds until_naming(std::chrono::milliseconds limit) {
  return limit >= 4 * kTimeToName ? limit - kTimeToName : limit;
}

}  // namespace

std::chrono::milliseconds timeout_of(std::chrono::milliseconds backend_timeout) {
  const auto text = c10::utils::get_env("TORCH_MOE_EP_TIMEOUT_S");
  if (!text.has_value() || text->empty()) return until_naming(backend_timeout * 4 / 5);
  int64_t seconds = 0;
  const char* end = text->data() + text->size();
  const auto parsed = std::from_chars(text->data(), end, seconds);
  TORCH_CHECK_VALUE(parsed.ec == std::errc() && parsed.ptr == end && seconds > 0,
                    "TORCH_MOE_EP_TIMEOUT_S must be a positive whole number of seconds, got ",
                    *text);
  return until_naming(std::chrono::seconds(seconds));
}

}  // namespace torch_moe_ep::comm
