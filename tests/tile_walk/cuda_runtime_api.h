// What the tile schedulers need of CUDA, on the host: a block of one warp, whose lanes are threads.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdint>

#define __device__
#define __forceinline__ inline

using cudaError_t = int;
using cudaStream_t = void*;

struct Index {
  unsigned x = 0;
};
inline thread_local Index threadIdx, blockIdx, gridDim;
using std::min;

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint64_t{a} * b) >> 32; }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

struct Warp {
  std::barrier<> meeting{32};
  int values[32];

  // Every lane's value, as `read` sees them.
  template <class Read>
  auto exchange(int value, Read read) {
    values[threadIdx.x] = value;
    meeting.arrive_and_wait();
    const auto found = read(values);
    meeting.arrive_and_wait();
    return found;
  }
};
inline Warp warp;

inline int __shfl_up_sync(uint32_t, int value, int delta) {
  const int lane = threadIdx.x;
  return warp.exchange(value, [&](int* v) { return lane < delta ? value : v[lane - delta]; });
}
inline int __shfl_sync(uint32_t, int value, int lane) {
  return warp.exchange(value, [&](int* v) { return v[lane]; });
}
inline uint32_t __ballot_sync(uint32_t, bool is_set) {
  return warp.exchange(is_set, [](int* v) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= uint32_t{v[lane] != 0} << lane;
    return bits;
  });
}
inline void __syncwarp() { warp.meeting.arrive_and_wait(); }
