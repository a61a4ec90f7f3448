#include "dispatch/dispatch_kernels.h"

#include <algorithm>

#include "common/vector.cuh"

namespace torch_moe_ep {
namespace {

constexpr int kPlaceThreads = 512;
constexpr int kPlaceWarps = kPlaceThreads / kWarpSize;
// Every block reads the counts of all blocks, so their number is bounded.
constexpr int kMaxPlaceBlocks = 256;

constexpr int kMoveWarps = 8;
// 4 accesses of 16 bytes in flight a lane: a warp moves 2 KiB, enough to cover memory latency.
constexpr int kAccessesPerLane = 4;

static_assert(kMaxExperts <= kPlaceThreads, "one thread an expert");
static_assert(kMaxTopK <= kWarpSize, "one lane a slot");
static_assert(kPlaceThreads < (1 << 16), "a tile's counts are 16-bit");

__host__ __device__ inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

inline int64_t copies_per_block(int64_t num_copies) {
  const int64_t share = (num_copies + kMaxPlaceBlocks - 1) / kMaxPlaceBlocks;
  return std::max<int64_t>(round_up(share, kPlaceThreads), kPlaceThreads);
}

// The expert of copy `n`, or -1 past the end and for an id that no expert has.
__device__ inline int expert_of_copy(const CopyPlaces& p, int64_t n, int64_t end) {
  if (n >= end) return -1;
  const int64_t id = p.expert_ids[n];
  return id >= 0 && id < p.num_experts ? static_cast<int>(id) : -1;
}

// Copies of each expert in this block's range. The atomics add integers, so order cannot matter.
__global__ void __launch_bounds__(kPlaceThreads)
    count_copies(const CopyPlaces p, int64_t copies_per_block) {
  __shared__ int32_t histogram[kMaxExperts];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < p.num_experts) histogram[thread] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * copies_per_block;
  const int64_t end = min(begin + copies_per_block, p.num_copies);
  for (int64_t tile = begin; tile < end; tile += kPlaceThreads) {
    const int64_t n = tile + thread;
    const int expert = expert_of_copy(p, n, end);
    // One add for all equal experts of a warp: a skewed routing costs no more than an even one.
    const unsigned peers = __match_any_sync(kFullMask, expert);
    const bool is_first = (peers & ((1u << (thread % kWarpSize)) - 1)) == 0;
    if (expert >= 0 && is_first) atomicAdd(&histogram[expert], __popc(peers));
    // Every writer writes the same value.
    if (n < end && expert < 0) *p.invalid_flag = 1;
  }
  __syncthreads();
  if (thread < p.num_experts) {
    p.block_counts[static_cast<int64_t>(blockIdx.x) * p.num_experts + thread] = histogram[thread];
  }
}

struct ExpertSums {
  int64_t before;  // copies of this thread's expert in the blocks before this one
  int64_t total;   // in all blocks
};

// Thread e < num_experts gets the sums of expert e. The counts of all blocks are read by all
// threads: thread = part * num_experts + expert takes the blocks part, part + num_parts, ...
__device__ ExpertSums sum_block_counts(const CopyPlaces& p, int64_t* before, int64_t* total) {
  const int thread = static_cast<int>(threadIdx.x);
  const int num_parts = kPlaceThreads / p.num_experts;
  const int part = thread / p.num_experts;
  const int expert = thread % p.num_experts;
  if (part < num_parts) {
    ExpertSums sums{0, 0};
    for (int block = part; block < static_cast<int>(gridDim.x); block += num_parts) {
      const int64_t count = p.block_counts[static_cast<int64_t>(block) * p.num_experts + expert];
      sums.total += count;
      if (block < static_cast<int>(blockIdx.x)) sums.before += count;
    }
    before[thread] = sums.before;
    total[thread] = sums.total;
  }
  __syncthreads();
  ExpertSums sums{0, 0};
  if (thread < p.num_experts) {
    for (int other = 0; other < num_parts; ++other) {
      sums.before += before[other * p.num_experts + thread];
      sums.total += total[other * p.num_experts + thread];
    }
  }
  return sums;
}

// A copy's slot = its expert's first slot + copies of this expert in earlier blocks, in earlier
// tiles of the block, in earlier warps of the tile, in earlier lanes of the warp.
// Example: ids 1 0 1 1, two experts, alignment 4: counts 1 3, offsets 0 4 8, slots 4 0 5 6.
__global__ void __launch_bounds__(kPlaceThreads)
    place_copies(const CopyPlaces p, int64_t copies_per_block) {
  __shared__ int64_t scratch[2][kPlaceThreads];
  __shared__ int64_t first_slot[kMaxExperts];
  __shared__ uint16_t warp_counts[kPlaceWarps][kMaxExperts];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;

  const ExpertSums sums = sum_block_counts(p, scratch[0], scratch[1]);
  __syncthreads();
  int64_t num_slots = 0;
  const int64_t offset = block_exclusive_sum<kPlaceThreads>(
      round_up(sums.total, p.row_alignment), scratch[0], &num_slots);
  if (blockIdx.x == 0 && thread < p.num_experts) {
    p.counts[thread] = sums.total;
    if (p.segment_offsets != nullptr) p.segment_offsets[thread] = offset;
  }
  if (blockIdx.x == 0 && thread == 0 && p.segment_offsets != nullptr) {
    p.segment_offsets[p.num_experts] = num_slots;
  }

  int64_t next_slot = p.first_slot + offset + sums.before;
  const int64_t begin = blockIdx.x * copies_per_block;
  const int64_t end = min(begin + copies_per_block, p.num_copies);
  for (int64_t tile = begin; tile < end; tile += kPlaceThreads) {
    for (int expert = lane; expert < p.num_experts; expert += kWarpSize) {
      warp_counts[warp][expert] = 0;
    }
    __syncwarp();
    const int64_t n = tile + thread;
    const int expert = expert_of_copy(p, n, end);
    const unsigned peers = __match_any_sync(kFullMask, expert);
    const int rank_in_warp = __popc(peers & ((1u << lane) - 1));
    if (expert >= 0 && rank_in_warp == 0) {
      warp_counts[warp][expert] = static_cast<uint16_t>(__popc(peers));
    }
    __syncthreads();
    if (thread < p.num_experts) {
      first_slot[thread] = next_slot;
      int in_tile = 0;
      for (int other = 0; other < kPlaceWarps; ++other) {
        const int count = warp_counts[other][thread];
        warp_counts[other][thread] = static_cast<uint16_t>(in_tile);
        in_tile += count;
      }
      next_slot += in_tile;
    }
    __syncthreads();
    if (n < end) {
      p.slot_of_copy[n] =
          expert < 0 ? -1 : first_slot[expert] + warp_counts[warp][expert] + rank_in_warp;
    }
    // The next tile writes its own warp's counts before the first barrier and first_slot after it.
    __syncwarp();
  }
}

// One (source rank, local expert) pair per blockIdx.x; blockIdx.y strides over its rows.
// Example: 2 ranks, 2 local experts, counts [[1, 2], [3, 1]], alignment 1: received rows
// r0e0 r0e1 r0e1 r1e0 r1e0 r1e0 r1e1 go to slots 0 4 5 1 2 3 6.
__global__ void __launch_bounds__(kPlaceThreads) place_received(const ReceivedPlaces p) {
  __shared__ int64_t pair_counts[kMaxExperts];
  __shared__ int64_t scratch[kPlaceWarps];
  __shared__ int64_t first_received;
  __shared__ int64_t first_slot;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_local = p.num_experts / p.num_ranks;
  const int this_pair = static_cast<int>(blockIdx.x);
  const int this_source = this_pair / num_local;
  const int this_expert = this_pair % num_local;

  int64_t count = 0;
  if (thread < p.num_experts) {
    const int source = thread / num_local;
    count = p.counts[static_cast<int64_t>(source) * p.num_experts + p.rank * num_local +
                     thread % num_local];
    pair_counts[thread] = count;
  }
  int64_t total = 0;
  const int64_t received = block_exclusive_sum<kPlaceThreads>(count, scratch, &total);
  if (thread == this_pair) first_received = received;

  int64_t length = 0;
  int64_t earlier_sources = 0;
  if (thread < num_local) {
    for (int source = 0; source < p.num_ranks; ++source) {
      if (source == this_source) earlier_sources = length;
      length += pair_counts[source * num_local + thread];
    }
  }
  const int64_t offset =
      block_exclusive_sum<kPlaceThreads>(round_up(length, p.row_alignment), scratch, &total);
  if (thread == this_expert) first_slot = offset + earlier_sources;
  if (this_pair == 0 && blockIdx.y == 0) {
    if (thread < num_local) p.expert_offsets[thread] = offset;
    if (thread == 0) p.expert_offsets[num_local] = total;
  }
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kPlaceThreads;
  for (int64_t i = blockIdx.y * kPlaceThreads + thread; i < pair_counts[this_pair]; i += stride) {
    p.slot_of_received[first_received + i] = first_slot + i;
  }
}

// As place_received, for the chunk blockIdx.z.
// Example: 1 rank, 2 experts, counts of two chunks [[2, 1]] and [[1, 3]], alignment 1: segments
// begin at 0 2 3 4, received rows e0 e0 e1 of chunk 0 go to slots 0 1 3, e0 e1 e1 e1 of chunk 1 to
// 2 4 5 6.
__global__ void __launch_bounds__(kPlaceThreads) place_chunks(const ChunkReceivedPlaces p) {
  __shared__ int64_t run_counts[kMaxExperts];  // of this chunk
  __shared__ int64_t scratch[kPlaceWarps];
  __shared__ int64_t first_received;
  __shared__ int64_t first_slot;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_local = p.num_experts / p.num_ranks;
  const int this_run = static_cast<int>(blockIdx.x);
  const int this_source = this_run / num_local;
  const int this_expert = this_run % num_local;
  const int this_chunk = static_cast<int>(blockIdx.z);
  const auto count_of = [&p, num_local](int chunk, int source, int expert) {
    return p.counts[(static_cast<int64_t>(chunk) * p.num_ranks + source) * p.num_experts +
                    p.rank * num_local + expert];
  };

  int64_t count = 0;
  int64_t earlier_chunks = 0;
  if (thread < p.num_experts) {
    const int source = thread / num_local, expert = thread % num_local;
    for (int chunk = 0; chunk < this_chunk; ++chunk) {
      earlier_chunks += count_of(chunk, source, expert);
    }
    count = count_of(this_chunk, source, expert);
    run_counts[thread] = count;
  }
  int64_t total = 0;
  const int64_t received = block_exclusive_sum<kPlaceThreads>(count, scratch, &total);
  block_exclusive_sum<kPlaceThreads>(earlier_chunks, scratch, &total);
  if (thread == this_run) first_received = total + received;

  int64_t length = 0;  // of the expert's segments
  int64_t before = 0;  // those of earlier chunks
  int64_t earlier_sources = 0;
  if (thread < num_local) {
    for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
      if (chunk == this_chunk) before = length;
      int64_t rows = 0;
      for (int source = 0; source < p.num_ranks; ++source) rows += count_of(chunk, source, thread);
      length += round_up(rows, p.row_alignment);
    }
    for (int source = 0; source < this_source; ++source) {
      earlier_sources += run_counts[source * num_local + thread];
    }
  }
  const int64_t offset = block_exclusive_sum<kPlaceThreads>(length, scratch, &total) + before;
  if (thread == this_expert) first_slot = offset + earlier_sources;
  if (this_run == 0 && blockIdx.y == 0) {
    if (thread < num_local) p.segment_offsets[thread * p.num_chunks + this_chunk] = offset;
    if (thread == 0) p.segment_offsets[num_local * p.num_chunks] = total;
  }
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kPlaceThreads;
  for (int64_t i = blockIdx.y * kPlaceThreads + thread; i < run_counts[this_run]; i += stride) {
    p.slot_of_received[first_received + i] = first_slot + i;
  }
}

// The part of a row that one warp moves, in words of the access width.
struct RowPart {
  int64_t row;
  int64_t first_word;
};

template <typename Word>
__device__ void copy_part(const PackedRows& p, const RowPart& part, int64_t row_words, int lane) {
  const Word* source = static_cast<const Word*>(p.source) + part.row * row_words;
  Word words[kAccessesPerLane];
#pragma unroll
  for (int i = 0; i < kAccessesPerLane; ++i) {
    const int64_t word = part.first_word + i * kWarpSize + lane;
    if (word < row_words) words[i] = source[word];
  }
  const int64_t first_copy = part.row * p.copies_per_source;
  int64_t lane_slot = -1;
  if (lane < p.copies_per_source) {
    lane_slot = p.slot_of_copy[first_copy + lane];
    if (p.row_weights != nullptr && part.first_word == 0 && lane_slot >= 0) {
      p.row_weights[lane_slot] = p.weights[first_copy + lane];
    }
  }
  for (int k = 0; k < p.copies_per_source; ++k) {
    const int64_t slot = __shfl_sync(kFullMask, lane_slot, k);
    if (slot < 0) continue;
    Word* target = static_cast<Word*>(p.rows) + slot * row_words;
#pragma unroll
    for (int i = 0; i < kAccessesPerLane; ++i) {
      const int64_t word = part.first_word + i * kWarpSize + lane;
      if (word < row_words) target[word] = words[i];
    }
  }
}

// part.row counts the places where padding may be: row_alignment - 1 at each segment's end.
template <typename Word>
__device__ void zero_part(const PackedRows& p, const RowPart& part, int64_t row_words, int lane) {
  const int64_t places = p.row_alignment - 1;
  const int expert = static_cast<int>(part.row / places);
  int64_t count = 0;
  for (int source = 0; source < p.num_ranks; ++source) {
    count += p.counts[static_cast<int64_t>(source) * p.num_experts + p.first_expert + expert];
  }
  const int64_t* segment = p.expert_offsets + static_cast<int64_t>(expert) * p.num_chunks + p.chunk;
  const int64_t slot = segment[0] + count + part.row % places;
  if (slot >= segment[1]) return;
  if (p.row_weights != nullptr && part.first_word == 0 && lane == 0) p.row_weights[slot] = 0.0f;
  Word* target = static_cast<Word*>(p.rows) + slot * row_words;
#pragma unroll
  for (int i = 0; i < kAccessesPerLane; ++i) {
    const int64_t word = part.first_word + i * kWarpSize + lane;
    if (word < row_words) target[word] = Word{};
  }
}

// One warp a part of a source row; it is read once and written to each of its slots.
template <typename Word>
__global__ void __launch_bounds__(kMoveWarps* kWarpSize)
    pack_rows(const PackedRows p, int64_t parts_per_row, int64_t num_padding_places) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t unit =
      static_cast<int64_t>(blockIdx.x) * kMoveWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t row = unit / parts_per_row;
  const int64_t first_word = (unit - row * parts_per_row) * (kAccessesPerLane * kWarpSize);
  const int64_t row_words = p.row_bytes / static_cast<int64_t>(sizeof(Word));
  if (row < p.num_sources) {
    copy_part<Word>(p, {row, first_word}, row_words, lane);
  } else if (row - p.num_sources < num_padding_places) {
    zero_part<Word>(p, {row - p.num_sources, first_word}, row_words, lane);
  }
}

template <typename Word>
cudaError_t launch_pack_words(const PackedRows& p, cudaStream_t stream) {
  constexpr int64_t kPartBytes = sizeof(Word) * kAccessesPerLane * kWarpSize;
  const int64_t parts_per_row = (p.row_bytes + kPartBytes - 1) / kPartBytes;
  const int64_t num_padding_places =
      p.expert_offsets == nullptr
          ? 0
          : static_cast<int64_t>(p.num_local_experts) * (p.row_alignment - 1);
  const int64_t units = (p.num_sources + num_padding_places) * parts_per_row;
  if (units == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((units + kMoveWarps - 1) / kMoveWarps);
  pack_rows<Word>
      <<<blocks, kMoveWarps * kWarpSize, 0, stream>>>(p, parts_per_row, num_padding_places);
  return cudaGetLastError();
}

}  // namespace

int num_place_blocks(int64_t num_copies) {
  const int64_t share = copies_per_block(num_copies);
  return static_cast<int>(std::max<int64_t>((num_copies + share - 1) / share, 1));
}

cudaError_t launch_place_copies(const CopyPlaces& places, cudaStream_t stream) {
  const int blocks = num_place_blocks(places.num_copies);
  const int64_t share = copies_per_block(places.num_copies);
  count_copies<<<blocks, kPlaceThreads, 0, stream>>>(places, share);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  place_copies<<<blocks, kPlaceThreads, 0, stream>>>(places, share);
  return cudaGetLastError();
}

cudaError_t launch_place_received(const ReceivedPlaces& places, cudaStream_t stream) {
  // 8 blocks a pair: 64 pairs fill the GPU, and a pair that got all rows is not left to one block.
  const dim3 grid(static_cast<unsigned>(places.num_experts), 8);
  place_received<<<grid, kPlaceThreads, 0, stream>>>(places);
  return cudaGetLastError();
}

cudaError_t launch_place_chunks(const ChunkReceivedPlaces& places, cudaStream_t stream) {
  const dim3 grid(
      static_cast<unsigned>(places.num_experts), 8, static_cast<unsigned>(places.num_chunks));
  place_chunks<<<grid, kPlaceThreads, 0, stream>>>(places);
  return cudaGetLastError();
}

cudaError_t launch_pack_rows(const PackedRows& packed, cudaStream_t stream) {
  const auto addresses =
      reinterpret_cast<uintptr_t>(packed.source) | reinterpret_cast<uintptr_t>(packed.rows);
  const auto bits = addresses | static_cast<uintptr_t>(packed.row_bytes);
  if (bits % kAccessBytes == 0) return launch_pack_words<uint4>(packed, stream);
  if (bits % sizeof(uint32_t) == 0) return launch_pack_words<uint32_t>(packed, stream);
  return launch_pack_words<uint16_t>(packed, stream);
}

}  // namespace torch_moe_ep
