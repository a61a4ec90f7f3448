#pragma once

// Rows of copies on their way from their owners into shared memory, a few ahead of their use.
//
// A lane reads from the ring what it has fetched itself: cp.async and a wait of its own order that,
// so a warp waits for no other.

#include <cstdint>

#include "combine/peer_kernels.h"
#include "common/copy_async.cuh"
#include "common/peer_slot.h"
#include "common/vector.cuh"

namespace torch_moe_ep {

// 24 accesses of 16 bytes a lane: with 512 threads 192 KiB in flight a multiprocessor, for the
// latency of a peer's memory. Devices with less shared memory run fewer threads.
constexpr int kPullStages = 3;
constexpr int kPullAccesses = 8;
constexpr int kMaxPullThreads = 512;
constexpr int kPartWords = kPullAccesses * kWarpSize;
constexpr int kRingBytesOfThread = kPullStages * kPullAccesses * kAccessBytes;

// How the work is dealt to warps: a turn is some parts of one row. Long turns, since the slots of
// a row's copies are read once a turn; short ones where rows are too few for all warps.
struct PullTurns {
  int64_t count;
  int per_row;
  int parts;  // of a turn; the last one of a row may have fewer
  int parts_per_row;
};

// Where a warp is: turn after turn, of a turn part after part, of a part copy after copy.
struct PullPlace {
  int64_t turn;
  int part;
  int end_part;
  int copy = 0;

  __device__ PullPlace(const PullTurns& turns, int64_t first_turn) { enter(turns, first_turn); }

  __device__ void enter(const PullTurns& turns, int64_t next_turn) {
    turn = next_turn;
    part = static_cast<int>(turn % turns.per_row) * turns.parts;
    end_part = min(part + turns.parts, turns.parts_per_row);
  }

  // True after the last copy of a part.
  __device__ bool end_copy(int num_copies) {
    copy = copy + 1 == num_copies ? 0 : copy + 1;
    return copy == 0;
  }
};

__device__ inline int next_stage(int stage) { return stage + 1 == kPullStages ? 0 : stage + 1; }

// The part of row that lane fetches in access i.
__device__ inline int64_t word_of_access(int part, int i, int lane) {
  return static_cast<int64_t>(part) * kPartWords + i * kWarpSize + lane;
}

// Of the slot's owner, mapped here.
__device__ inline const char* buffer_of_slot(const PulledRows& p, int64_t slot) {
  return static_cast<const char*>(p.buffers[slot >> kPeerOwnerShift]);
}

__device__ inline float weight_of_slot(const PulledRows& p, int64_t slot) {
  const char* weights = buffer_of_slot(p, slot) + p.weights_offset;
  return reinterpret_cast<const float*>(weights)[slot & kPeerSlotMask];
}

// Fetches copies in order, each into the next stage of the ring; a copy that is nowhere, and words
// behind a row's end, as zeros. Writes the weights of copies as it passes their rows.
class PullFetcher {
 public:
  // ring: this thread's first word, of [kPullStages, kPullAccesses, threads].
  __device__ PullFetcher(const PulledRows& pulled,
                         const PullTurns& turns,
                         int64_t row_words,
                         uint4* ring,
                         int64_t first_turn,
                         int64_t num_warps)
      : pulled_(pulled),
        turns_(turns),
        row_words_(row_words),
        ring_(static_cast<uint32_t>(__cvta_generic_to_shared(ring))),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        num_warps_(num_warps),
        place_(turns, first_turn),
        slot_(slot_of_turn(first_turn)),
        next_slot_(slot_of_turn(first_turn + num_warps)) {
    fetch_weight();
  }

  __device__ void fetch_next() {
    if (place_.turn < turns_.count) fetch_copy();
    copy_async_commit();
    stage_ = next_stage(stage_);
  }

 private:
  // Of this lane's copy.
  __device__ int64_t slot_of_turn(int64_t turn) const {
    const int num_copies = pulled_.copies_per_output;
    if (turn >= turns_.count || lane_ >= num_copies) return -1;
    return pulled_.slot_of_copy[turn / turns_.per_row * num_copies + lane_];
  }

  __device__ void fetch_copy() {
    const int64_t slot = __shfl_sync(kFullMask, slot_, place_.copy);
    const uint4* row = static_cast<const uint4*>(pulled_.out);  // of an absent copy nothing is read
    if (slot >= 0) {
      row = reinterpret_cast<const uint4*>(buffer_of_slot(pulled_, slot) + pulled_.rows_offset) +
            (slot & kPeerSlotMask) * row_words_;
    }
    const auto stride = static_cast<uint32_t>(blockDim.x) * kAccessBytes;
#pragma unroll
    for (int i = 0; i < kPullAccesses; ++i) {
      const int64_t word = word_of_access(place_.part, i, lane_);
      const bool is_there = slot >= 0 && word < row_words_;
      copy_async_16(
          ring_ + (stage_ * kPullAccesses + i) * stride, is_there ? row + word : row, is_there);
    }
    if (place_.end_copy(pulled_.copies_per_output) && ++place_.part == place_.end_part) end_turn();
  }

  __device__ void end_turn() {
    write_weight();
    place_.enter(turns_, place_.turn + num_warps_);
    slot_ = next_slot_;
    next_slot_ = slot_of_turn(place_.turn + num_warps_);
    fetch_weight();
  }

  // Weights go with a row's first turn.
  __device__ bool has_weight() const {
    return pulled_.weights != nullptr && lane_ < pulled_.copies_per_output &&
           place_.turn % turns_.per_row == 0;
  }

  // Of the turn that begins; nobody waits for it before the turn's end.
  __device__ void fetch_weight() {
    if (slot_ >= 0 && has_weight()) weight_ = weight_of_slot(pulled_, slot_);
  }

  __device__ void write_weight() {
    if (!has_weight()) return;
    const int64_t output = place_.turn / turns_.per_row;
    pulled_.weights[output * pulled_.copies_per_output + lane_] = slot_ >= 0 ? weight_ : 0.0f;
  }

  const PulledRows& pulled_;
  const PullTurns& turns_;
  int64_t row_words_;
  uint32_t ring_;
  int lane_;
  int64_t num_warps_;
  PullPlace place_;
  int64_t slot_;
  int64_t next_slot_;
  float weight_ = 0.0f;
  int stage_ = 0;
};

}  // namespace torch_moe_ep
