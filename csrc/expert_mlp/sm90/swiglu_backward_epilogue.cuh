// The gradient of SwiGLU in the epilogue of d activation = dY W_down. z comes by TMA into the store
// buffers, 64 rows x 32 columns of gate and up at a time; each thread replaces what it reads there
// by the gradients, and the same buffer leaves by TMA. All of it runs under the other group's main
// loop.
#pragma once

#include "expert_mlp/fast_sigmoid.cuh"
#include "expert_mlp/sm90/epilogue.cuh"

namespace torch_moe_ep::sm90 {

// The chunks of z of a group's tiles, read kStoreBuffers ahead in the order in which they are
// stored: 32 columns after another, then the next 64 rows.
template <class Config>
struct ZChunks {
  const KernelArguments& args;
  const SharedLayout<Config>& shared;
  int group;
  int thread;  // in the group
  // Of the ring of buffers: the next chunk's
  int buffer = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ int chunks_per_block(int column) const {
    return min(Config::kBlockN, args.columns - column + kSwigluColumns - 1) / kSwigluColumns;
  }

  // By one thread: chunk number `chunk` of the tile at (row, column), into the buffer `ahead` after
  // the next, whose last stores have been read, or into L2 alone.
  __device__ __forceinline__ void load(int row, int column, int chunk, int ahead) const {
    const int per_block = chunks_per_block(column);
    const int block = chunk >= per_block ? 1 : 0;
    const int chunk_column = column + (chunk - block * per_block) * kSwigluColumns;
    const int chunk_row = row + block * kChunk;
    if (ahead >= Config::kStoreBuffers) {
      tma_prefetch_3d(args.z, chunk_column, 0, chunk_row);
      tma_prefetch_3d(args.z, chunk_column, 1, chunk_row);
      return;
    }
    const int into = (buffer + ahead) % Config::kStoreBuffers;
    const uint32_t target = shared.store_buffer(group, into), full = shared.z_full(group, into);
    barrier_expect_bytes(full, 2 * kSwigluPartBytes);
    tma_load_3d(target, args.z, full, chunk_column, 0, chunk_row);
    tma_load_3d(target + kSwigluPartBytes, args.z, full, chunk_column, 1, chunk_row);
  }

  // Before the main loop, so that the first chunks are there and the others in L2 when it ends.
  __device__ __forceinline__ void begin_tile(int row, int column) const {
    if (thread != 0) return;
    tma_store_wait_read<0>();
    const int num_chunks = Config::kRowBlocks * chunks_per_block(column);
    for (int chunk = 0; chunk < num_chunks; ++chunk) load(row, column, chunk, chunk);
  }

  // The buffer with chunk number `chunk` of the tile. The buffer before it is loaded again.
  __device__ __forceinline__ uint32_t acquire(int row, int column, int chunk) const {
    constexpr int kAhead = Config::kStoreBuffers - 1;
    if (thread == 0 && chunk > 0 &&
        chunk + kAhead < Config::kRowBlocks * chunks_per_block(column)) {
      tma_store_wait_read<0>();
      load(row, column, chunk + kAhead, kAhead);
    }
    barrier_wait(shared.z_full(group, buffer), phase);
    return shared.store_buffer(group, buffer);
  }

  __device__ __forceinline__ void next() {
    if (++buffer == Config::kStoreBuffers) {
      buffer = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ float2 unpack_bf16(uint32_t word) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
}

// What the gradients of one (gate, up) pair are made of: h = silu(gate) * up, a = w h.
struct SwigluGradient {
  float gate;
  float up;
  float activation;

  // grad: of a. dot gains grad * h, the gradient of w.
  __device__ __forceinline__
  SwigluGradient(float gate_value, float up_value, float grad, float row_weight, float& dot) {
    const float sigmoid = fast_sigmoid(gate_value);
    const float silu = gate_value * sigmoid;
    const float hidden = silu * up_value;
    const float grad_hidden = row_weight * grad;
    dot += grad * hidden;
    activation = row_weight * hidden;
    up = grad_hidden * silu;
    gate = grad_hidden * (up_value * sigmoid + hidden * (1.0f - sigmoid));
  }
};

// In place: gate, up -> their gradients; behind them the activation. address: the lane's in
// the buffer. grads: 16 accumulator words.
__device__ __forceinline__ void write_swiglu_backward_chunk(uint32_t address,
                                                            const float* grads,
                                                            const float (&row_weights)[2],
                                                            float (&dots)[2]) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {  // 16 columns each
    const uint32_t target = address ^ (pair * 32);
    uint32_t gate[4], up[4], activation[4];
    load_matrix_x4(gate, target);
    load_matrix_x4(up, target + kSwigluPartBytes);
#pragma unroll
    for (int word = 0; word < 4; ++word) {  // word % 2: rows +0 or +8
      const float2 gates = unpack_bf16(gate[word]), ups = unpack_bf16(up[word]);
      const float* grad = grads + pair * 8 + word * 2;
      const float weight = row_weights[word % 2];
      float& dot = dots[word % 2];
      const SwigluGradient low(gates.x, ups.x, grad[0], weight, dot);
      const SwigluGradient high(gates.y, ups.y, grad[1], weight, dot);
      gate[word] = pack_bf16(low.gate, high.gate);
      up[word] = pack_bf16(low.up, high.up);
      activation[word] = pack_bf16(low.activation, high.activation);
    }
    store_matrix_x4(target, gate[0], gate[1], gate[2], gate[3]);
    store_matrix_x4(target + kSwigluPartBytes, up[0], up[1], up[2], up[3]);
    store_matrix_x4(
        target + 2 * kSwigluPartBytes, activation[0], activation[1], activation[2], activation[3]);
  }
}

// The rows' sums over this tile's columns; a quad of lanes holds two rows.
__device__ __forceinline__ void store_dots(float* target, float (&dots)[2], int thread) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    dots[half] += __shfl_xor_sync(0xffffffffu, dots[half], 1);
    dots[half] += __shfl_xor_sync(0xffffffffu, dots[half], 2);
    if (thread % 4 == 0) target[half * 8] = dots[half];
  }
}

template <class Config>
__device__ __forceinline__ void store_swiglu_backward_tile(
    const float (&acc)[Config::kRowBlocks][Config::kBlockN / 2],
    const KernelArguments& args,
    StoreBuffers<Config>& buffers,
    ZChunks<Config>& z,
    int row,
    int column) {
  constexpr int kChunks = Config::kBlockN / kSwigluColumns;
#pragma unroll
  for (int block = 0; block < Config::kRowBlocks; ++block) {
    const int block_row = row + block * kChunk;
    const int lane_row = block_row + buffers.thread / 32 * 16 + buffers.thread % 32 / 4;
    const float row_weights[2] = {args.row_weights[lane_row], args.row_weights[lane_row + 8]};
    float dots[2] = {0.0f, 0.0f};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int chunk_column = column + chunk * kSwigluColumns;
      if (chunk_column < args.columns) {
        const int number = block * z.chunks_per_block(column) + chunk;
        const uint32_t buffer = z.acquire(row, column, number);
        write_swiglu_backward_chunk(
            buffer + buffers.lane_offset, &acc[block][chunk * 16], row_weights, dots);
        z.next();
        buffers.publish();
        if (buffers.thread == 0) {
          tma_store_3d(args.out, buffer, chunk_column, 0, block_row);
          tma_store_3d(args.out, buffer + kSwigluPartBytes, chunk_column, 1, block_row);
          tma_store_3d(args.activation, buffer + 2 * kSwigluPartBytes, chunk_column, block_row, 0);
          tma_store_commit();
        }
      }
    }
    store_dots(
        args.partial_dots + column / Config::kBlockN * args.rows + lane_row, dots, buffers.thread);
  }
}

}  // namespace torch_moe_ep::sm90
