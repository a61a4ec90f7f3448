// From accumulators to global memory: stmatrix into swizzled chunks, then TMA stores, kStoreBatch
// chunks at a time.
#pragma once

#include <cuda_bf16.h>

#include "expert_mlp/sm90/kernel_config.cuh"
#include "expert_mlp/sm90/ptx.cuh"

namespace torch_moe_ep::sm90 {

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Row of the 64-row block whose address this lane gives to stmatrix.
__device__ __forceinline__ int store_row(int thread) {
  const int lane = thread % 32;
  return thread / 32 * 16 + lane % 8 + lane / 8 % 2 * 8;
}

// Where this lane's 16 bytes of the first 16 columns lie in a chunk of rows of kRowBytes, which is
// swizzled over as many. Chunks are 1024-aligned: those of another 16 columns lie where these
// columns' bits differ.
template <int kRowBytes>
__device__ __forceinline__ uint32_t store_offset(int thread) {
  const int row = store_row(thread);
  const int swizzle = row * kRowBytes / 128 % (kRowBytes / 16);
  return row * kRowBytes + ((thread % 32 / 16) ^ swizzle) * 16;
}

// SwiGLU's store buffers hold three chunks of 64 rows x 32 columns: gate, up, activation.
inline constexpr int kSwigluColumns = 32;
inline constexpr int kSwigluRowBytes = 64;
inline constexpr int kSwigluPartBytes = 64 * kSwigluRowBytes;

// The group's store buffers, used in turn, kStoreBatch at a time.
template <class Config>
struct StoreBuffers {
  const SharedLayout<Config>& shared;
  int group;
  int thread;            // in the group
  uint32_t lane_offset;  // store_offset
  int next = 0;

  __device__ __forceinline__ StoreBuffers(const SharedLayout<Config>& shared, int group, int thread)
      : shared(shared),
        group(group),
        thread(thread),
        lane_offset(store_offset<Config::kHasSwiglu ? kSwigluRowBytes : kStepRowBytes>(thread)) {
    asm volatile("" : "+r"(lane_offset));  // kept, not computed anew for each chunk
  }

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

// 64 rows x 64 columns into a chunk with the 128-byte swizzle. address: the lane's in it. values:
// 32 accumulator words.
__device__ __forceinline__ void write_chunk(uint32_t address, const float* values) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {  // 16 columns each
    uint32_t words[4];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const float* value = values + pair * 8 + word * 2;
      words[word] = pack_bf16(value[0], value[1]);
    }
    store_matrix_x4(address ^ (pair * 32), words[0], words[1], words[2], words[3]);
  }
}

// acc *= alpha, apart from the conversion, so that the usual alpha of 1 costs nothing.
template <class Config>
__device__ __forceinline__ void scale_tile(float (&acc)[Config::kRowBlocks][Config::kBlockN / 2],
                                           float alpha) {
  if (alpha == 1.0f) return;
#pragma unroll
  for (int block = 0; block < Config::kRowBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < Config::kBlockN / 2; ++i) acc[block][i] *= alpha;
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
          write_chunk(buffer + i * Config::kStoreBufferBytes + buffers.lane_offset,
                      &acc[block][(first + i) * 32]);
        }
        buffers.publish();
        if (buffers.thread == 0) {
          store_batch<Config>(args, buffer, row + block * kChunk, batch_column, expert);
        }
      }
    }
  }
}

// For a tile of which no step was multiplied: its accumulators hold nothing.
template <class Config>
__device__ __forceinline__ void store_zeros(
    const KernelArguments& args, StoreBuffers<Config>& buffers, int row, int column, int expert) {
  constexpr float kZeros[Config::kRowBlocks][Config::kBlockN / 2] = {};
  store_tile<Config>(kZeros, args, buffers, row, column, expert);
}

inline constexpr int kFloatColumns = 32;  // of a 64-row chunk in fp32

// 64 rows x 32 columns of fp32 into a chunk with the 128-byte swizzle. values: 16 accumulator
// words.
__device__ __forceinline__ void write_float_chunk(uint32_t buffer,
                                                  const float* values,
                                                  int thread) {
  const int lane = thread % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = thread / 32 * 16 + half * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < kFloatColumns / 8; ++j) {
      const int column = (j * 2 + lane % 4 / 2) ^ (row & 7);
      store_float2(buffer + row * 128 + column * 16 + lane % 2 * 8,
                   values[j * 4 + half * 2],
                   values[j * 4 + half * 2 + 1]);
    }
  }
}

// out += the tile. Each element is added by one thread of the copy engine in one launch, so the sum
// is the same from run to run.
template <class Config>
__device__ __forceinline__ void add_tile(
    const float (&acc)[Config::kRowBlocks][Config::kBlockN / 2],
    const KernelArguments& args,
    StoreBuffers<Config>& buffers,
    int row,
    int column,
    int expert) {
  constexpr int kBatchColumns = Config::kStoreBatch * kFloatColumns;
#pragma unroll
  for (int block = 0; block < Config::kRowBlocks; ++block) {
#pragma unroll
    for (int first = 0; first < Config::kBlockN; first += kBatchColumns) {
      if (column + first < args.columns) {
        const uint32_t buffer = buffers.acquire();
#pragma unroll
        for (int i = 0; i < Config::kStoreBatch; ++i) {
          write_float_chunk(buffer + i * Config::kStoreBufferBytes,
                            &acc[block][(first + i * kFloatColumns) / 2],
                            buffers.thread);
        }
        buffers.publish();
        if (buffers.thread == 0) {
#pragma unroll
          for (int i = 0; i < Config::kStoreBatch; ++i) {
            const int chunk_column = column + first + i * kFloatColumns;
            if (chunk_column < args.columns) {
              tma_add_3d(args.out,
                         buffer + i * Config::kStoreBufferBytes,
                         chunk_column,
                         row + block * kChunk,
                         expert);
            }
          }
          tma_store_commit();
        }
      }
    }
  }
}

}  // namespace torch_moe_ep::sm90
