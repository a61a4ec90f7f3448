// SwiGLU in the epilogue of the up projection.
#pragma once

#include "expert_mlp/fast_sigmoid.cuh"
#include "expert_mlp/sm90/epilogue.cuh"

namespace torch_moe_ep::sm90 {

__device__ __forceinline__ float silu(float x) { return x * fast_sigmoid(x); }

// 64 rows x (32 gate + 32 up) accumulators, 8 gate and 8 up columns by turns, into three 64 x 32
// chunks with the 64-byte swizzle: gate, up and row_weight * silu(gate) * up. address: the lane's
// in the first.
__device__ __forceinline__ void write_swiglu_chunk(uint32_t address,
                                                   const float* values,
                                                   const float (&row_weights)[2]) {
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
    const uint32_t target = address ^ (pair * 32);
    store_matrix_x4(target, gate[0], gate[1], gate[2], gate[3]);
    store_matrix_x4(target + kSwigluPartBytes, up[0], up[1], up[2], up[3]);
    store_matrix_x4(
        target + 2 * kSwigluPartBytes, activation[0], activation[1], activation[2], activation[3]);
  }
}

template <class Config>
__device__ __forceinline__ void store_swiglu_tile(
    const float (&acc)[Config::kRowBlocks][Config::kBlockN / 2],
    const KernelArguments& args,
    StoreBuffers<Config>& buffers,
    int row,
    int column) {
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
        write_swiglu_chunk(buffer + buffers.lane_offset, &acc[block][chunk * 32], row_weights);
        buffers.publish();
        if (buffers.thread == 0) {
          tma_store_3d(args.out, buffer, chunk_column, 0, block_row);
          tma_store_3d(args.out, buffer + kSwigluPartBytes, chunk_column, 1, block_row);
          tma_store_3d(args.activation, buffer + 2 * kSwigluPartBytes, chunk_column, block_row, 0);
          tma_store_commit();
        }
      }
    }
  }
}

}  // namespace torch_moe_ep::sm90
