#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>

#include <utility>

#include "chunks/peer_transport.h"
#include "combine/peer_rows.h"
#include "comm/label.h"
#include "common/chunk_sizes.h"
#include "dispatch/dispatch_cuda.h"
#include "dispatch/peer_dispatch.h"
#include "dispatch/peer_rows.h"

namespace torch_moe_ep {
namespace {

// Tokens of a chunk.
struct TokenRange {
  int64_t first;
  int64_t count;

  at::Tensor of(const at::Tensor& tokens) const { return tokens.narrow(0, first, count); }
};

TokenRange tokens_of(int64_t chunk, int64_t num_chunks, int64_t num_tokens) {
  const int64_t first = first_token_of(chunk, num_chunks, num_tokens);
  return {first, first_token_of(chunk + 1, num_chunks, num_tokens) - first};
}

// Sizes from the counts, or the capacity where the host has none.
ChunkSegments segments_of(const ChunkPlan& plan, int64_t rank) {
  const int64_t num_chunks = plan.counts.size(0);
  if (plan.capacity > 0) {
    const at::Tensor unknown = at::empty({0}, plan.host_counts.options());
    return {num_chunks, plan.capacity, plan.segment_offsets, unknown};
  }
  const at::Tensor offsets = segment_offsets_of(plan.host_counts, rank, plan.row_alignment);
  const int64_t num_slots = offsets.const_data_ptr<int64_t>()[offsets.numel() - 1];
  return {num_chunks, num_slots, plan.segment_offsets, offsets};
}

// Slots of the rank that has most.
int64_t room_of(const ChunkPlan& plan) {
  if (plan.capacity > 0) return plan.capacity;
  return largest_num_slots(plan.host_counts, plan.row_alignment);
}

}  // namespace

PeerChunks::PeerChunks(ChunkPlan plan, ChunkStages stages, ChunkRows tokens)
    : plan_(std::move(plan)),
      stages_(stages),
      tokens_(std::move(tokens)),
      sends_weights_(tokens_.weights.defined()),
      peers_(comm::PeerGroup::of(plan_.group_name, tokens_.rows.device())),
      segments_(segments_of(plan_, peers_.rank())) {
  const int64_t room = room_of(plan_);
  arrived_ = PeerRegion::from(0, room, tokens_.rows);
  leaving_ = PeerRegion::from(arrived_.end, room, tokens_.rows);
  check_num_sms(plan_.num_sms);
  check_top_k_on_cuda(plan_.top_k);
  peers_.reserve(leaving_.end);
}

PeerChunks::~PeerChunks() {
  try {
    join();
  } catch (const c10::Error&) {  // NOLINT(bugprone-empty-catch)
    // CUDA refuses everything since the error that is already on its way to the caller.
  }
}

ChunkRows PeerChunks::rows_in(const PeerRegion& region, bool has_weights) const {
  const at::Tensor& buffer = peers_.buffer().own;
  return {region.rows(buffer, segments_.num_slots, tokens_.rows),
          has_weights ? region.weights(buffer, segments_.num_slots) : at::Tensor()};
}

ChunkRows PeerChunks::arrived() { return rows_in(arrived_, sends_weights_); }

ChunkRows PeerChunks::leaving() { return rows_in(leaving_, !sends_weights_); }

void PeerChunks::push(int64_t chunk) {
  const TokenRange tokens = tokens_of(chunk, segments_.num_chunks, tokens_.rows.size(0));
  const TokenRange copies = {tokens.first * plan_.top_k, tokens.count * plan_.top_k};
  const Source source = {tokens.of(tokens_.rows),
                         sends_weights_ ? tokens.of(tokens_.weights) : at::Tensor(),
                         copies.of(plan_.slot_of_copy),
                         plan_.top_k};
  push_rows_cuda(source, arrived_, peers_.buffer().on_ranks(), plan_.num_sms);
}

void PeerChunks::start_dispatch(int64_t chunk) {
  const comm::ScopedStage stage(stages_.dispatch);
  if (chunk == 0) {
    peers_.enter();
    peers_.row_stream().fork();
    is_moving_ = true;
  }
  const c10::cuda::CUDAStreamGuard on_row_stream(peers_.row_stream().stream());
  if (chunk == 0) peers_.meet();  // nobody reads or writes the buffers for what came before
  push(chunk);
  if (chunk == 0) {
    const ChunkRows rows = arrived();
    const Packed into = {rows.rows, sends_weights_ ? rows.weights : rows.rows.narrow(0, 0, 0)};
    zero_padding_cuda(into, segments_.offsets, plan_.counts, peers_.rank());
  }
  peers_.meet();  // the chunk's rows have come
  have_come_.emplace_back().record(peers_.row_stream().stream());
}

void PeerChunks::finish_dispatch(int64_t chunk) {
  have_come_[chunk].block(c10::cuda::getCurrentCUDAStream(tokens_.rows.get_device()));
}

ChunkRows PeerChunks::kept(bool has_rows) {
  const ChunkRows rows = arrived();
  const ChunkRows kept = {has_rows ? at::empty_like(rows.rows) : at::Tensor(),
                          sends_weights_ ? at::empty_like(rows.weights) : at::Tensor()};
  peers_.copy_stream().fork();
  is_copying_ = true;
  const c10::cuda::CUDAStreamGuard on_copy_stream(peers_.copy_stream().stream());
  if (has_rows) comm::copy_rows(rows.rows, kept.rows.mutable_data_ptr(), segments_.offsets);
  if (sends_weights_) {
    comm::copy_rows(rows.weights, kept.weights.mutable_data_ptr(), segments_.offsets);
  }
  return kept;
}

void PeerChunks::start_combine(int64_t chunk) {
  const comm::ScopedStage stage(stages_.combine);
  const int64_t num_tokens = tokens_.rows.size(0), num_weights = sends_weights_ ? 0 : num_tokens;
  if (chunk == 0) {
    sums_ = {at::empty_like(tokens_.rows),
             at::empty({num_weights, plan_.top_k}, tokens_.rows.options().dtype(at::kFloat))};
  }
  const TokenRange tokens = tokens_of(chunk, segments_.num_chunks, num_tokens);
  const TokenRange copies = {tokens.first * plan_.top_k, tokens.count * plan_.top_k};
  const Gathered into = {tokens.of(sums_.out),
                         sends_weights_ ? sums_.weights : tokens.of(sums_.weights)};
  peers_.row_stream().fork();  // after the chunk's results are written
  const c10::cuda::CUDAStreamGuard on_row_stream(peers_.row_stream().stream());
  peers_.meet();  // they are in place on every rank
  pull_rows_cuda(into,
                 copies.of(plan_.slot_of_copy),
                 plan_.top_k,
                 leaving_,
                 peers_.buffer().on_ranks(),
                 plan_.num_sms);
}

void PeerChunks::join() {
  if (is_copying_) peers_.copy_stream().join();
  is_copying_ = false;
  if (!is_moving_) return;
  is_moving_ = false;
  peers_.row_stream().join();
  // What comes next in the group, on any stream, comes after what the current one has read here.
  peers_.enter();
}

ChunkRows PeerChunks::finish_combine() {
  join();
  return {sums_.out, sends_weights_ ? at::Tensor() : sums_.weights};
}

}  // namespace torch_moe_ep
