#pragma once

// Kernels of the peer transport's meetings. Raw pointers and a stream, nothing of torch. Every
// launcher returns the launch error.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace torch_moe_ep::comm {

constexpr int kMaxPeers = 64;              // a bit each in PeerReport::missing
constexpr int kMaxGatheredNumbers = 8192;  // a rank's numbers in one gathering: 128 KiB of control

// Device memory of this rank. Counting happens here, so that replays of a CUDA graph go on where
// the run before them stopped.
struct PeerState {
  uint64_t meetings;    // that ended
  uint64_t gatherings;  // that ended
  uint64_t has_failed;  // 1 once a peer was given up: later meetings return at once
};

// Host memory that the device writes when it gives up on peers; has_failed comes last.
struct PeerReport {
  uint64_t missing;   // bit r: rank r of the group
  const char* stage;  // as PeerMeeting has it
  int64_t layer;
  uint64_t has_failed;
};

// A meeting ends on a rank when all ranks of the group have come to it. What a rank wrote before,
// into anybody's memory, all ranks read after. One warp each: it waits for other GPUs alone, so it
// leaves the other multiprocessors to whatever those GPUs wait for. Beside a GEMM it begins when
// that gives a multiprocessor back.
struct PeerMeeting {
  void* const* control;  // [num_ranks] control blocks, control_bytes(num_ranks) each
  PeerState* state;
  PeerReport* report;
  int num_ranks;
  int rank;
  int64_t timeout_ns;  // for each meeting
  const char* stage;   // of the host, for the report, as the layer is
  int64_t layer;
};

// A control block, zeros at first: the number of the last meeting that each rank came to, then the
// numbers gathered, twice, since a rank may be one gathering ahead.
int64_t control_bytes(int num_ranks);

cudaError_t launch_meeting(const PeerMeeting& meeting, cudaStream_t stream);

// all[r] = own of rank r, on every rank; zeros after a failure. A meeting as well.
struct GatheredNumbers {
  PeerMeeting meeting;
  const int64_t* own;  // [count]
  int64_t* all;        // [num_ranks, count]
  int count;           // at most kMaxGatheredNumbers
  // The same in host memory, then host_value into host_ready; null: not wanted.
  int64_t* host_all;
  uint64_t* host_ready;
  uint64_t host_value;
};

cudaError_t launch_gather_numbers(const GatheredNumbers& gathered, cudaStream_t stream);

// target[0 .. min(*num_units, max_units)) = source, in units of unit_bytes; the device alone need
// know how many.
struct CountedCopy {
  const void* source;
  void* target;
  int64_t unit_bytes;
  const int64_t* num_units;  // device memory
  int64_t max_units;
};

cudaError_t launch_counted_copy(const CountedCopy& copy, cudaStream_t stream);

}  // namespace torch_moe_ep::comm
