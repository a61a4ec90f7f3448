// Where an operand of wgmma lies in shared memory.
#pragma once

#include <cstdint>

namespace torch_moe_ep::sm90 {

// Matrix descriptor of a 128-byte-swizzled operand in shared memory.
//   K-major:  rows of 64 k (128 B); 8-row groups 1024 B apart; chunk_bytes is ignored.
//             A 16-deep k step adds 32 to the address.
//   MN-major: chunks of 64 m or n (128 B), one row a k; groups of 8 k 1024 B apart, chunks
//             chunk_bytes apart. A 16-deep k step adds 2048 to the address.
// The address is a field of the lower word, in units of 16 bytes, that no address inside a CTA's
// shared memory overflows: moving on by bytes is one addition.
struct MatrixDescriptor {
  uint32_t low;

  __device__ __forceinline__ static MatrixDescriptor of(uint32_t address, uint32_t chunk_bytes) {
    constexpr uint32_t kAddressBits = 0x3FFFF;  // above them: which CTA of the cluster
    return {((address & kAddressBits) >> 4) | (chunk_bytes >> 4 << 16)};
  }
  __device__ __forceinline__ MatrixDescriptor moved(int bytes) const { return {low + bytes / 16}; }
  __device__ __forceinline__ uint64_t value() const {
    constexpr uint64_t kGroupBytes = 1024;
    constexpr uint64_t kSwizzle128 = 1;
    return (kSwizzle128 << 62) | (kGroupBytes >> 4 << 32) | low;
  }
};

}  // namespace torch_moe_ep::sm90
