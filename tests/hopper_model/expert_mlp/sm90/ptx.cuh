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
inline void tma_prefetch_3d(const CUtensorMap&, int, int, int) {}

// What a map of results is told of each store, when it is issued.
inline std::function<void(int x0, int x1, int x2)> on_store;

// Of results that take the place of what was loaded: the copy engine reads them some time later,
// and until then nothing else may have landed there.
inline void tma_store_3d(const CUtensorMap& map, uint32_t shared, int x0, int x1, int x2) {
  if (map.operand != 'O') return;
  const int cta = device::current->cta;
  const device::Box stored = {'Z', map.box_rows, x0, x1, x2};
  const auto check = [=] {
    const device::Memory& memory = device::of<device::Memory>(cta);
    const auto found = memory.find(shared & 0xffffff);
    if (found == memory.end() || found->second != stored) device::fail("a store", x0, x1, x2);
  };
  check();
  on_store(x0, x1, x2);
  int& num_unread = device::bulk_of_current().num_unread.back();
  ++num_unread;
  device::events.push_back([=, &num_unread] {
    check();
    --num_unread;
  });
}
inline void tma_store_commit() { device::bulk_of_current().num_unread.push_back(0); }
template <int kPending>
void tma_store_wait_read() {
  const auto& groups = device::bulk_of_current().num_unread;
  const int wanted = static_cast<int>(groups.size()) - 1 - kPending;
  device::block_until([&groups, wanted] {
    for (int i = 0; i < wanted; ++i) {
      if (groups[i] > 0) return false;
    }
    return true;
  });
}
inline void tma_store_wait_all() { tma_store_wait_read<0>(); }

// Each lane remembers what lay where it read, and finds it there when it writes.
inline void load_matrix_x4(uint32_t (&)[4], uint32_t shared) {
  const device::Memory& memory = device::of<device::Memory>(device::current->cta);
  const auto found = memory.find(shared & 0xffffe0 & ~0x20u);
  if (found == memory.end()) device::fail("nothing was loaded here");
  device::current->seen[shared & 0xffffff] = found->second;
}
inline void store_matrix_x4(uint32_t shared, uint32_t, uint32_t, uint32_t, uint32_t) {
  const auto seen = device::current->seen.find(shared & 0xffffff);
  if (seen == device::current->seen.end()) return;
  const device::Memory& memory = device::of<device::Memory>(device::current->cta);
  if (memory.at(shared & 0xffffe0 & ~0x20u) != seen->second) device::fail("z was overwritten");
  device::current->seen.erase(seen);
}

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
