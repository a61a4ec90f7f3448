#include "dispatch/peer_plan_kernels.h"

#include <algorithm>

#include "common/peer_slot.h"
#include "common/vector.cuh"

namespace torch_moe_ep {
namespace {

constexpr int kSegmentThreads = 256;
constexpr int kPlaceThreads = 256;

__device__ inline int64_t round_up_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Rows of a segment, and those of them that come from the ranks before this one.
struct SegmentRows {
  int64_t length;
  int64_t before;
};

__device__ inline SegmentRows rows_of_segment(const PeerSegments& p, int chunk, int expert) {
  SegmentRows rows = {0, 0};
  for (int source = 0; source < p.num_ranks; ++source) {
    const int64_t row = static_cast<int64_t>(chunk) * p.num_ranks + source;
    const int64_t count = p.counts[row * p.num_experts + expert];
    if (source < p.rank) rows.before += count;
    rows.length += count;
  }
  return rows;
}

// Example: 2 ranks, 2 experts each, one chunk, alignment 4, counts [[1, 2, 0, 3], [3, 3, 1, 0]]:
// the segments of rank 0 have 4 and 5 rows and begin at 0 and 4, and it needs 12; those of rank 1
// have 1 and 3, begin at 0 and 4, and it needs 8. First slots of rank 1's copies: 1, 6, 0, 7.
__global__ void __launch_bounds__(kSegmentThreads) place_segments(const PeerSegments p) {
  __shared__ int64_t scratch[kSegmentThreads / kWarpSize];
  const int owner = static_cast<int>(blockIdx.x);
  const int num_local = p.num_experts / p.num_ranks;
  const int num_segments = num_local * p.num_chunks;
  const int64_t limit = p.capacity > 0 ? p.capacity : INT64_MAX;
  const bool is_own = owner == p.rank;
  int64_t carry = 0;
  for (int first = 0; first < num_segments; first += kSegmentThreads) {
    const int segment = first + static_cast<int>(threadIdx.x);
    const bool is_there = segment < num_segments;
    const int chunk = segment % p.num_chunks;
    const int expert = owner * num_local + segment / p.num_chunks;
    const SegmentRows rows = is_there ? rows_of_segment(p, chunk, expert) : SegmentRows{0, 0};
    int64_t total = 0;
    const int64_t padded = round_up_to(rows.length, p.row_alignment);
    const int64_t slot = carry + block_exclusive_sum<kSegmentThreads>(padded, scratch, &total);
    carry += total;
    if (!is_there) continue;
    p.first_slots[static_cast<int64_t>(chunk) * p.num_experts + expert] = slot + rows.before;
    if (is_own) p.segment_offsets[segment] = min(slot, limit);
  }
  if (threadIdx.x != 0) return;
  if (is_own) p.segment_offsets[num_segments] = min(carry, limit);
  // Integers alone, so order cannot matter.
  if (carry > limit) atomicMax(reinterpret_cast<long long*>(p.slots_needed), carry);
}

// The last chunk that begins at or before the token: chunk c begins at floor(c * T / C).
__device__ inline int64_t chunk_of_token(const PeerCopyPlaces& p, int64_t token) {
  return ((token + 1) * p.num_chunks - 1) / p.num_tokens;
}

__global__ void __launch_bounds__(kPlaceThreads) place_peer_copies(const PeerCopyPlaces p) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kPlaceThreads;
  const int64_t num_copies = p.num_tokens * p.top_k;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kPlaceThreads + threadIdx.x; n < num_copies;
       n += stride) {
    const int64_t place = p.slot_of_copy[n];
    if (place < 0) continue;
    const int64_t expert = p.expert_ids[n];
    const int64_t chunk = chunk_of_token(p, n / p.top_k);
    const int64_t slot = p.first_slots[chunk * p.num_experts + expert] + place -
                         p.place_offsets[chunk * (p.num_experts + 1) + expert];
    const int64_t owner = expert / p.num_local_experts;
    const bool has_room = p.capacity == 0 || slot < p.capacity;
    p.slot_of_copy[n] = has_room ? (owner << kPeerOwnerShift) + slot : -1;
  }
}

}  // namespace

cudaError_t launch_place_segments(const PeerSegments& segments, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(segments.num_ranks);
  place_segments<<<blocks, kSegmentThreads, 0, stream>>>(segments);
  return cudaGetLastError();
}

cudaError_t launch_place_peer_copies(const PeerCopyPlaces& places, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 1024;
  const int64_t needed = (places.num_tokens * places.top_k + kPlaceThreads - 1) / kPlaceThreads;
  if (needed == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(std::min(needed, kMaxBlocks));
  place_peer_copies<<<blocks, kPlaceThreads, 0, stream>>>(places);
  return cudaGetLastError();
}

}  // namespace torch_moe_ep
