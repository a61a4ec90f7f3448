// Hopper instructions that CUDA C++ has no words for: mbarrier, TMA, cluster and named barriers.
// Shared-memory addresses are the 32-bit ones of the shared window.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace torch_moe_ep::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine and to the other CTAs of the cluster.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the same barrier of another CTA of the cluster. Without .release.cluster on purpose:
// that form compiles to a GPU-wide memory barrier in front of every arrive. What the arrive
// protects are reads by wgmma, complete after wgmma.wait_group.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier, uint32_t cta_rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
      "r"(cta_rank)
      : "memory");
}

// A CTA without a cluster has no remote shared memory, and compute-sanitizer takes an access in
// that form for an error.
template <int kClusterSize>
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t cta_rank) {
  if constexpr (kClusterSize == 1) {
    barrier_arrive(barrier);
  } else {
    barrier_arrive_remote(barrier, cta_rank);
  }
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}\n" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// Writes an int to shared memory of a CTA of the cluster and completes a phase of its barrier.
__device__ __forceinline__ void store_remote(uint32_t shared,
                                             int value,
                                             uint32_t barrier,
                                             uint32_t cta_rank) {
  asm volatile(
      "{\n.reg .b32 target, done;\n"
      "mapa.shared::cluster.u32 target, %0, %3;\n"
      "mapa.shared::cluster.u32 done, %2, %3;\n"
      "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [done], 4;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [target], %1, [done];\n}\n" ::
          "r"(shared),
      "r"(value),
      "r"(barrier),
      "r"(cta_rank)
      : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t shared, int value) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

__device__ __forceinline__ int load_shared(uint32_t shared) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(shared) : "memory");
  return value;
}

// ---- TMA: global to shared, completing on an mbarrier ----

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void tma_load_3d(
    uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x0, int x1, int x2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
      "l"(&map),
      "r"(barrier),
      "r"(x0),
      "r"(x1),
      "r"(x2)
      : "memory");
}

// Lands at the same offset, and completes on the same barrier, in every CTA of cta_mask.
__device__ __forceinline__ void tma_load_3d_multicast(uint32_t shared,
                                                      const CUtensorMap& map,
                                                      uint32_t barrier,
                                                      int x0,
                                                      int x1,
                                                      int x2,
                                                      uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared),
      "l"(&map),
      "r"(barrier),
      "r"(x0),
      "r"(x1),
      "r"(x2),
      "h"(cta_mask)
      : "memory");
}

__device__ __forceinline__ void tma_load_5d(uint32_t shared,
                                            const CUtensorMap& map,
                                            uint32_t barrier,
                                            int x0,
                                            int x1,
                                            int x2,
                                            int x3,
                                            int x4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
      "l"(&map),
      "r"(barrier),
      "r"(x0),
      "r"(x1),
      "r"(x2),
      "r"(x3),
      "r"(x4)
      : "memory");
}

__device__ __forceinline__ void tma_load_5d_multicast(uint32_t shared,
                                                      const CUtensorMap& map,
                                                      uint32_t barrier,
                                                      int x0,
                                                      int x1,
                                                      int x2,
                                                      int x3,
                                                      int x4,
                                                      uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared),
      "l"(&map),
      "r"(barrier),
      "r"(x0),
      "r"(x1),
      "r"(x2),
      "r"(x3),
      "r"(x4),
      "h"(cta_mask)
      : "memory");
}

// Into L2 alone.
__device__ __forceinline__ void tma_prefetch_3d(const CUtensorMap& map, int x0, int x1, int x2) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(&map),
               "r"(x0),
               "r"(x1),
               "r"(x2)
               : "memory");
}

// ---- TMA: shared to global, in bulk groups of the issuing thread ----

__device__ __forceinline__ void tma_store_3d(
    const CUtensorMap& map, uint32_t shared, int x0, int x1, int x2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
      "r"(shared),
      "r"(x0),
      "r"(x1),
      "r"(x2)
      : "memory");
}

// global += shared, element by element.
__device__ __forceinline__ void tma_add_3d(
    const CUtensorMap& map, uint32_t shared, int x0, int x1, int x2) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group"
      " [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
      "r"(shared),
      "r"(x0),
      "r"(x1),
      "r"(x2)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until the shared memory of all but the last kPending groups may be written again.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void tma_store_wait_all() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Each writer of shared memory that TMA reads next, before the barrier between them.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- named barriers, clusters, registers ----

__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ uint32_t cluster_cta_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void store_float2(uint32_t shared, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(x), "f"(y) : "memory");
}

// ---- stmatrix, ldmatrix: four 8x8 bf16 matrices; lane l gives the address of row l % 8 of matrix
// l / 8 ----

__device__ __forceinline__ void store_matrix_x4(
    uint32_t shared, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(m0),
               "r"(m1),
               "r"(m2),
               "r"(m3)
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&words)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

}  // namespace torch_moe_ep::sm90
