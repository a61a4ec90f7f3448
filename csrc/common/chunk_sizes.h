#pragma once

#include <cstdint>

namespace torch_moe_ep {

// A rank's T tokens in C chunks of consecutive tokens, as equal as they can be; some are empty
// where there are fewer tokens than chunks. Example: 5 tokens in 3 chunks begin at 0, 1 and 3.
inline int64_t first_token_of(int64_t chunk, int64_t num_chunks, int64_t num_tokens) {
  return chunk * num_tokens / num_chunks;
}

}  // namespace torch_moe_ep
