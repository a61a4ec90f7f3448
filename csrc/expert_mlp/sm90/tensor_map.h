// Tensor maps for the copy engine, encoded on the host once per launch (about 1 us each): weights
// move between launches under FSDP, so a cached map would go stale.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace torch_moe_ep::sm90 {

enum class Swizzle { k64Bytes, k128Bytes };

// A tensor of `rank` dimensions, bf16 or fp32, innermost first; strides in elements, of dimension 1
// on (the innermost is contiguous). `box` is what one copy moves; outside the tensor it reads zeros
// and writes nothing.
struct TensorMapSpec {
  const void* address;
  int rank;
  uint64_t sizes[5];
  uint64_t strides[4];
  uint32_t box[5];
  Swizzle swizzle;
  bool is_float32 = false;
};

cudaError_t encode_tensor_map(const TensorMapSpec& spec, CUtensorMap* map);

}  // namespace torch_moe_ep::sm90
