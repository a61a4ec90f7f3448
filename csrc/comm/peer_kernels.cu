#include "comm/peer_kernels.h"

#include <algorithm>

#include "common/vector.cuh"

namespace torch_moe_ep::comm {
namespace {

constexpr int kMeetingThreads = kWarpSize;
constexpr int kGatherThreads = 512;
constexpr unsigned kNapNs = 100;

constexpr int kCopyThreads = 256;
constexpr int kCopiesPerThread = 4;  // 16-byte accesses in flight a thread
// Enough to fill any GPU; blocks stride over what is more.
constexpr int64_t kMaxCopyBlocks = 2048;

__device__ inline uint64_t now_ns() {
  uint64_t time = 0;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

// What this thread has seen written before, also by others, is there for who acquires the value.
__device__ inline void store_release(uint64_t* target, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(target), "l"(value) : "memory");
}

__device__ inline uint64_t load_acquire(const uint64_t* source) {
  uint64_t value = 0;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(source) : "memory");
  return value;
}

__device__ inline uint64_t* arrivals(const PeerMeeting& m, int rank) {
  return static_cast<uint64_t*>(m.control[rank]);
}

// [num_ranks, kMaxGatheredNumbers] of a rank, for odd or even gatherings.
__device__ inline int64_t* gathered_numbers(const PeerMeeting& m, int rank, uint64_t gathering) {
  int64_t* first = static_cast<int64_t*>(m.control[rank]) + kMaxPeers;
  return first + static_cast<int64_t>(gathering % 2) * m.num_ranks * kMaxGatheredNumbers;
}

// Whether the peer came to the meeting within the time-out, which runs from start.
__device__ bool wait_for(const PeerMeeting& m, int peer, uint64_t meeting, uint64_t start) {
  const uint64_t* arrived = arrivals(m, m.rank) + peer;
  while (load_acquire(arrived) < meeting) {
    if (now_ns() - start > static_cast<uint64_t>(m.timeout_ns)) return false;
    __nanosleep(kNapNs);
  }
  return true;
}

__device__ void report_missing(const PeerMeeting& m, uint64_t missing) {
  m.state->has_failed = 1;
  m.report->missing = missing;
  m.report->stage = m.stage;
  m.report->layer = m.layer;
  __threadfence_system();
  store_release(&m.report->has_failed, 1);
}

// By one whole warp, a lane for every 32nd peer; false after a failure. A rank that has failed says
// nothing any more, so that its peers give up too.
__device__ bool meet(const PeerMeeting& m) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const uint64_t meeting = m.state->meetings + 1;
  if (m.state->has_failed != 0) return false;
  __threadfence_system();
  __syncwarp();
  for (int peer = lane; peer < m.num_ranks; peer += kWarpSize) {
    store_release(arrivals(m, peer) + m.rank, meeting);
  }
  const uint64_t start = now_ns();
  uint64_t missing = 0;
  for (int peer = lane; peer < m.num_ranks; peer += kWarpSize) {
    if (!wait_for(m, peer, meeting, start)) missing |= uint64_t{1} << peer;
  }
  const unsigned low = __reduce_or_sync(kFullMask, static_cast<unsigned>(missing));
  const unsigned high = __reduce_or_sync(kFullMask, static_cast<unsigned>(missing >> 32));
  missing = uint64_t{high} << 32 | low;
  if (lane == 0) {
    m.state->meetings = meeting;
    if (missing != 0) report_missing(m, missing);
  }
  return missing == 0;
}

__global__ void __launch_bounds__(kMeetingThreads) meeting_kernel(const PeerMeeting m) { meet(m); }

// A rank's numbers of gathering g are overwritten by those of g + 2, which their sender writes
// after the meeting of g + 1, to which this rank comes after it has read g.
__global__ void __launch_bounds__(kGatherThreads) gather_numbers_kernel(const GatheredNumbers p) {
  __shared__ bool is_complete;
  const PeerMeeting& m = p.meeting;
  const int thread = static_cast<int>(threadIdx.x);
  const uint64_t gathering = m.state->gatherings;
  for (int peer = 0; peer < m.num_ranks; ++peer) {
    int64_t* target =
        gathered_numbers(m, peer, gathering) + static_cast<int64_t>(m.rank) * kMaxGatheredNumbers;
    for (int i = thread; i < p.count; i += kGatherThreads) target[i] = p.own[i];
  }
  __threadfence_system();
  __syncthreads();
  if (thread < kWarpSize) {
    const bool have_all_come = meet(m);
    if (thread == 0) is_complete = have_all_come;
  }
  __syncthreads();
  const int64_t* source = gathered_numbers(m, m.rank, gathering);
  for (int rank = 0; rank < m.num_ranks; ++rank) {
    for (int i = thread; i < p.count; i += kGatherThreads) {
      const int64_t number =
          is_complete ? __ldcg(source + static_cast<int64_t>(rank) * kMaxGatheredNumbers + i) : 0;
      p.all[rank * p.count + i] = number;
      if (p.host_all != nullptr) p.host_all[rank * p.count + i] = number;
    }
  }
  __threadfence_system();
  __syncthreads();
  if (thread != 0) return;
  m.state->gatherings = gathering + 1;
  if (p.host_ready != nullptr && is_complete) store_release(p.host_ready, p.host_value);
}

template <typename Word>
__global__ void __launch_bounds__(kCopyThreads)
    counted_copy_kernel(const CountedCopy p, int64_t words_per_unit) {
  const Word* source = static_cast<const Word*>(p.source);
  Word* target = static_cast<Word*>(p.target);
  const int64_t num_words = min(*p.num_units, p.max_units) * words_per_unit;
  constexpr int64_t kBlockWords = kCopyThreads * kCopiesPerThread;
  for (int64_t first = blockIdx.x * kBlockWords + threadIdx.x; first < num_words;
       first += gridDim.x * kBlockWords) {
    Word words[kCopiesPerThread];
#pragma unroll
    for (int i = 0; i < kCopiesPerThread; ++i) {
      const int64_t word = first + i * kCopyThreads;
      if (word < num_words) words[i] = source[word];
    }
#pragma unroll
    for (int i = 0; i < kCopiesPerThread; ++i) {
      const int64_t word = first + i * kCopyThreads;
      if (word < num_words) target[word] = words[i];
    }
  }
}

template <typename Word>
cudaError_t launch_copy_of_words(const CountedCopy& copy, cudaStream_t stream) {
  const int64_t words_per_unit = copy.unit_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t block_words = kCopyThreads * kCopiesPerThread;
  const int64_t blocks = (copy.max_units * words_per_unit + block_words - 1) / block_words;
  if (blocks == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>(std::min(blocks, kMaxCopyBlocks));
  counted_copy_kernel<Word><<<grid, kCopyThreads, 0, stream>>>(copy, words_per_unit);
  return cudaGetLastError();
}

}  // namespace

int64_t control_bytes(int num_ranks) {
  return static_cast<int64_t>(sizeof(int64_t)) *
         (kMaxPeers + 2 * static_cast<int64_t>(num_ranks) * kMaxGatheredNumbers);
}

cudaError_t launch_meeting(const PeerMeeting& meeting, cudaStream_t stream) {
  meeting_kernel<<<1, kMeetingThreads, 0, stream>>>(meeting);
  return cudaGetLastError();
}

cudaError_t launch_gather_numbers(const GatheredNumbers& gathered, cudaStream_t stream) {
  if (gathered.count > kMaxGatheredNumbers) return cudaErrorInvalidValue;
  gather_numbers_kernel<<<1, kGatherThreads, 0, stream>>>(gathered);
  return cudaGetLastError();
}

cudaError_t launch_counted_copy(const CountedCopy& copy, cudaStream_t stream) {
  const auto bits = reinterpret_cast<uintptr_t>(copy.source) |
                    reinterpret_cast<uintptr_t>(copy.target) |
                    static_cast<uintptr_t>(copy.unit_bytes);
  if (bits % kAccessBytes == 0) return launch_copy_of_words<uint4>(copy, stream);
  if (bits % sizeof(uint32_t) == 0) return launch_copy_of_words<uint32_t>(copy, stream);
  return launch_copy_of_words<uint16_t>(copy, stream);
}

}  // namespace torch_moe_ep::comm
