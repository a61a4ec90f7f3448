#include "dispatch/node_kernels.h"

#include "common/vector.cuh"
#include "dispatch/dispatch_kernels.h"

namespace torch_moe_ep {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
// 8 blocks a (source rank, expert) pair: a pair that got all rows is not left to one block.
constexpr int kBlocksPerPair = 8;

static_assert(kMaxExperts <= kThreads, "one thread a pair");

inline unsigned num_blocks(int64_t num_copies) {
  return static_cast<unsigned>((num_copies + kThreads - 1) / kThreads);
}

__device__ inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The node of a copy's expert, -1 for an id that no expert has.
__device__ inline int64_t node_of_copy(const FirstCopies& p, int64_t copy) {
  const int64_t id = p.expert_ids[copy];
  return id >= 0 && id < p.num_experts ? id / p.experts_per_node : -1;
}

__global__ void __launch_bounds__(kThreads) first_copies(const FirstCopies p) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= p.num_copies) return;
  const int64_t node = node_of_copy(p, n);
  bool is_first = node >= 0;
  for (int64_t earlier = n - n % p.top_k; earlier < n; ++earlier) {
    is_first = is_first && node_of_copy(p, earlier) != node;
  }
  p.nodes[n] = is_first ? node : -1;
  p.ids[n] = node >= 0 ? static_cast<int32_t>(p.expert_ids[n]) : -1;
}

__global__ void __launch_bounds__(kThreads) ids_on_node(const IdsOnNode p) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= p.num_copies) return;
  const int id = p.expert_ids[n];
  const bool is_here = id >= p.first_expert && id < p.first_expert + p.experts_per_node;
  p.ids[n] = is_here ? id - p.first_expert : -1;
}

// One (place, local expert, source node) triple per blockIdx.x, in the order in which their rows
// arrive; blockIdx.y strides over its rows. The triples are the (source rank, local expert) pairs,
// so there are as many as experts.
__global__ void __launch_bounds__(kThreads) place_received(const NodeReceivedPlaces p) {
  __shared__ int64_t triple_counts[kMaxExperts];
  __shared__ int64_t scratch[kWarps];
  __shared__ int64_t first_received;
  __shared__ int64_t first_slot;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_local = p.num_experts / p.num_ranks;
  const int num_nodes = p.num_ranks / p.ranks_per_node;
  const int this_triple = static_cast<int>(blockIdx.x);
  const int this_expert = this_triple / num_nodes % num_local;
  const int this_source =
      this_triple % num_nodes * p.ranks_per_node + this_triple / num_nodes / num_local;

  int64_t count = 0;
  if (thread < p.num_experts) {
    const int source = thread % num_nodes * p.ranks_per_node + thread / num_nodes / num_local;
    const int expert = p.rank * num_local + thread / num_nodes % num_local;
    count = p.counts[static_cast<int64_t>(source) * p.num_experts + expert];
    triple_counts[thread] = count;
  }
  // The sum's barriers make the counts of all threads visible below.
  int64_t total = 0;
  const int64_t received = block_exclusive_sum<kThreads>(count, scratch, &total);
  if (thread == this_triple) first_received = received;

  int64_t length = 0;
  int64_t earlier_sources = 0;
  if (thread < num_local) {
    for (int source = 0; source < p.num_ranks; ++source) {
      if (source == this_source) earlier_sources = length;
      const int place = source % p.ranks_per_node;
      const int node = source / p.ranks_per_node;
      length += triple_counts[(place * num_local + thread) * num_nodes + node];
    }
  }
  const int64_t offset =
      block_exclusive_sum<kThreads>(round_up(length, p.row_alignment), scratch, &total);
  if (thread == this_expert) first_slot = offset + earlier_sources;
  if (this_triple == 0 && blockIdx.y == 0) {
    if (thread < num_local) p.expert_offsets[thread] = offset;
    if (thread == 0) p.expert_offsets[num_local] = total;
  }
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = blockIdx.y * kThreads + thread; i < triple_counts[this_triple]; i += stride) {
    p.slot_of_received[first_received + i] = first_slot + i;
  }
}

}  // namespace

cudaError_t launch_first_copies(const FirstCopies& copies, cudaStream_t stream) {
  if (copies.num_copies == 0) return cudaSuccess;
  first_copies<<<num_blocks(copies.num_copies), kThreads, 0, stream>>>(copies);
  return cudaGetLastError();
}

cudaError_t launch_ids_on_node(const IdsOnNode& ids, cudaStream_t stream) {
  if (ids.num_copies == 0) return cudaSuccess;
  ids_on_node<<<num_blocks(ids.num_copies), kThreads, 0, stream>>>(ids);
  return cudaGetLastError();
}

cudaError_t launch_node_place_received(const NodeReceivedPlaces& places, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(places.num_experts), kBlocksPerPair);
  place_received<<<grid, kThreads, 0, stream>>>(places);
  return cudaGetLastError();
}

}  // namespace torch_moe_ep
