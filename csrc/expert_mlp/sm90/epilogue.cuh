// From accumulators to global memory: stmatrix into swizzled chunks, then TMA stores, kStoreBatch
// chunks at a time.
#pragma once

#include <cuda_bf16.h>

#include "expert_mlp/sm90/kernel_config.cuh"
#include "expert_mlp/sm90/ptx.cuh"

namespace torch_moe_ep::sm90 {

inline constexpr int kGroupBarrier = 1;  // named barriers 1, 2: one consumer group each

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The group's store buffers, used in turn, kStoreBatch at a time.
template <class Config>
struct StoreBuffers {
  const SharedLayout<Config>& shared;
  int group;
  int thread;  // in the group
  int next = 0;

  // The first of a batch, once its last stores have been read.
  __device__ __forceinline__ uint32_t acquire() {
    constexpr int kBatches = Config::kStoreBuffers / Config::kStoreBatch;
    const uint32_t buffer = shared.store_buffer(group, next * Config::kStoreBatch);
    next = next + 1 == kBatches ? 0 : next + 1;
    if (thread == 0) tma_store_wait_read<kBatches - 1>();
    named_barrier_sync(kGroupBarrier + group, kGroupThreads);
    return buffer;
  }
  __device__ __forceinline__ void publish() {
    fence_proxy_async();
    named_barrier_sync(kGroupBarrier + group, kGroupThreads);
  }
};

// Row of the 64-row block whose address this lane gives to stmatrix.
__device__ __forceinline__ int store_row(int thread) {
  const int lane = thread % 32;
  return thread / 32 * 16 + lane % 8 + lane / 8 % 2 * 8;
}

// 64 rows x 64 columns into a chunk with the 128-byte swizzle. values: 32 accumulator words.
__device__ __forceinline__ void write_chunk(uint32_t buffer, const float* values, int thread) {
  const int row = store_row(thread);
  const int lane_column = thread % 32 / 16;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {  // 16 columns each
    uint32_t words[4];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const float* value = values + pair * 8 + word * 2;
      words[word] = pack_bf16(value[0], value[1]);
    }
    const int column = (pair * 2 + lane_column) ^ (row & 7);
    store_matrix_x4(buffer + row * 128 + column * 16, words[0], words[1], words[2], words[3]);
  }
}

// acc *= alpha, or zeros for a tile of which no step was multiplied: its accumulators hold nothing.
// Apart from the conversion, so that the usual alpha of 1 costs nothing.
template <class Config>
__device__ __forceinline__ void scale_tile(float (&acc)[Config::kRowBlocks][Config::kBlockN / 2],
                                           float alpha,
                                           bool is_zero) {
  if (alpha == 1.0f && !is_zero) return;
#pragma unroll
  for (int block = 0; block < Config::kRowBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < Config::kBlockN / 2; ++i) {
      acc[block][i] = is_zero ? 0.0f : acc[block][i] * alpha;
    }
  }
}

// By one thread: the batch's chunks that lie inside the matrix.
template <class Config>
__device__ __forceinline__ void store_batch(
    const KernelArguments& args, uint32_t buffer, int row, int column, int expert) {
#pragma unroll
  for (int i = 0; i < Config::kStoreBatch; ++i) {
    if (column + i * kChunk < args.columns) {
      tma_store_3d(
          args.out, buffer + i * Config::kStoreBufferBytes, column + i * kChunk, row, expert);
    }
  }
  tma_store_commit();
}

// row: of `out` (in the expert for TN).
template <class Config>
__device__ __forceinline__ void store_tile(
    const float (&acc)[Config::kRowBlocks][Config::kBlockN / 2],
    const KernelArguments& args,
    StoreBuffers<Config>& buffers,
    int row,
    int column,
    int expert) {
#pragma unroll
  for (int block = 0; block < Config::kRowBlocks; ++block) {
#pragma unroll
    for (int first = 0; first < Config::kColumnChunks; first += Config::kStoreBatch) {
      const int batch_column = column + first * kChunk;
      if (batch_column < args.columns) {
        const uint32_t buffer = buffers.acquire();
#pragma unroll
        for (int i = 0; i < Config::kStoreBatch; ++i) {
          write_chunk(buffer + i * Config::kStoreBufferBytes,
                      &acc[block][(first + i) * 32],
                      buffers.thread);
        }
        buffers.publish();
        if (buffers.thread == 0) {
          store_batch<Config>(args, buffer, row + block * kChunk, batch_column, expert);
        }
      }
    }
  }
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// 64 rows x (32 gate + 32 up) accumulators, 8 gate and 8 up columns by turns, into three 64 x 32
// chunks with the 64-byte swizzle: gate, up and row_weight * silu(gate) * up.
__device__ __forceinline__ void write_swiglu_chunk(uint32_t buffer,
                                                   const float* values,
                                                   const float (&row_weights)[2],
                                                   int thread) {
  constexpr int kPartBytes = 64 * 64;
  const int row = store_row(thread);
  const int lane_column = thread % 32 / 16;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {  // 16 columns of gate, of up and of the activation
    uint32_t gate[4], up[4], activation[4];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      // word % 2: rows +0 or +8; word / 2: which 8 columns.
      const float* g = values + pair * 16 + word / 2 * 8 + word % 2 * 2;
      const float* u = g + 4;
      const float weight = row_weights[word % 2];
      gate[word] = pack_bf16(g[0], g[1]);
      up[word] = pack_bf16(u[0], u[1]);
      activation[word] = pack_bf16(weight * silu(g[0]) * u[0], weight * silu(g[1]) * u[1]);
    }
    const int column = (pair * 2 + lane_column) ^ ((row >> 1) & 3);
    const uint32_t address = buffer + row * 64 + column * 16;
    store_matrix_x4(address, gate[0], gate[1], gate[2], gate[3]);
    store_matrix_x4(address + kPartBytes, up[0], up[1], up[2], up[3]);
    store_matrix_x4(
        address + 2 * kPartBytes, activation[0], activation[1], activation[2], activation[3]);
  }
}

template <class Config>
__device__ __forceinline__ void store_swiglu_tile(
    const float (&acc)[Config::kRowBlocks][Config::kBlockN / 2],
    const KernelArguments& args,
    StoreBuffers<Config>& buffers,
    int row,
    int column) {
  constexpr int kPartBytes = 64 * 64;
#pragma unroll
  for (int block = 0; block < Config::kRowBlocks; ++block) {
    const int block_row = row + block * kChunk;
    const float* weights =
        args.row_weights + block_row + buffers.thread / 32 * 16 + buffers.thread % 32 / 4;
    const float row_weights[2] = {weights[0], weights[8]};
#pragma unroll
    for (int chunk = 0; chunk < Config::kColumnChunks; ++chunk) {
      const int chunk_column = column / 2 + chunk * (kChunk / 2);
      if (chunk_column < args.columns / 2) {
        const uint32_t buffer = buffers.acquire();
        write_swiglu_chunk(buffer, &acc[block][chunk * 32], row_weights, buffers.thread);
        buffers.publish();
        if (buffers.thread == 0) {
          tma_store_3d(args.out, buffer, chunk_column, 0, block_row);
          tma_store_3d(args.out, buffer + kPartBytes, chunk_column, 1, block_row);
          tma_store_3d(args.activation, buffer + 2 * kPartBytes, chunk_column, block_row, 0);
          tma_store_commit();
        }
      }
    }
  }
}

}  // namespace torch_moe_ep::sm90
