// In the place of csrc's file of this name: its instructions, modelled.
#pragma once

#include <cuda.h>

#include "device.h"

namespace torch_moe_ep::sm90 {

inline uint32_t shared_address(const void*) { return uint32_t(device::current->cta) << 24 | 1024; }

inline uint32_t address_in(uint32_t shared, uint32_t cta_rank) {
  return (device::first_cta_of_cluster() + cta_rank) << 24 | (shared & 0xffffff);
}

inline void barrier_init(uint32_t barrier, int arrivals) {
  device::barrier(barrier) = {arrivals, arrivals};
}
inline void fence_barrier_init() {}
inline void barrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  device::barrier(barrier).bytes += static_cast<int>(bytes);
  device::arrive(barrier);
}
inline void barrier_arrive(uint32_t barrier) { device::arrive(barrier); }
template <int kClusterSize>
void barrier_arrive_at(uint32_t barrier, uint32_t cta_rank) {
  device::arrive(address_in(barrier, cta_rank));
}
inline void barrier_wait(uint32_t barrier, uint32_t phase) {
  device::block_until([=] { return device::barrier(barrier).phase % 2 != phase; });
}

inline void store_shared(uint32_t shared, int value) { device::of<int>(shared) = value; }
inline int load_shared(uint32_t shared) { return device::of<int>(shared); }
inline void store_remote(uint32_t shared, int value, uint32_t barrier, uint32_t cta_rank) {
  device::barrier(address_in(barrier, cta_rank)).bytes += 4;
  device::arrive(address_in(barrier, cta_rank));
  device::events.push_back(
      [target = address_in(shared, cta_rank), full = address_in(barrier, cta_rank), value] {
        store_shared(target, value);
        device::complete_bytes(full, 4);
      });
}

inline void prefetch_tensor_map(const CUtensorMap&) {}
inline void tma_load_3d_multicast(
    uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x0, int x1, int x2, int mask) {
  device::load_box(shared, map.operand, map.box_rows, barrier, x0, x1, x2, mask);
}
inline void tma_load_3d(
    uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x0, int x1, int x2) {
  const int rank = device::current->cta - device::first_cta_of_cluster();
  tma_load_3d_multicast(shared, map, barrier, x0, x1, x2, 1 << rank);
}
// Of gate_up: groups of 8 rows of gate and 8 of up, numbered by x3; as rows one behind the other.
inline void tma_load_5d(
    uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x0, int, int, int x3, int x4) {
  tma_load_3d(shared, map, barrier, x0, x3 * 16, x4);
}
inline void tma_load_5d_multicast(uint32_t shared,
                                  const CUtensorMap& map,
                                  uint32_t barrier,
                                  int x0,
                                  int,
                                  int,
                                  int x3,
                                  int x4,
                                  int mask) {
  tma_load_3d_multicast(shared, map, barrier, x0, x3 * 16, x4, mask);
}
inline void tma_store_wait_all() {}

inline void named_barrier_sync(int barrier, int threads) {
  device::of<device::Meeting>(device::current->cta * 100 + barrier).sync(threads);
}
inline void named_barrier_arrive(int barrier, int threads) {
  device::of<device::Meeting>(device::current->cta * 100 + barrier).arrive(threads);
}
inline uint32_t cluster_cta_rank() { return device::current->cta - device::first_cta_of_cluster(); }
inline void cluster_sync() {
  device::of<device::Meeting>(-1 - device::first_cta_of_cluster())
      .sync(device::cluster_size * device::kThreads);
}
template <int kRegisters>
void decrease_registers() {}
template <int kRegisters>
void increase_registers() {}

}  // namespace torch_moe_ep::sm90
