#pragma once

// Copies from global to shared memory that a thread goes on beside (cp.async, from sm_80 on).

#include <cstdint>

namespace torch_moe_ep {

// 16 bytes from global to shared memory, zeros if !is_inside (then `global` is not read).
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global, bool is_inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared),
               "l"(global),
               "r"(is_inside ? 16 : 0)
               : "memory");
}

// What this thread has begun since the last call is one group.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// All of this thread's groups but the last kPending are there for it to read.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace torch_moe_ep
