#include "chunks/collective_transport.h"

#include <ATen/Functions.h>

#include <utility>

#include "comm/label.h"

namespace torch_moe_ep {
namespace {

// Rows [first, first + count) of both.
ChunkRows cut(const ChunkRows& whole, int64_t first, int64_t count) {
  return {whole.rows.narrow(0, first, count),
          whole.weights.defined() ? whole.weights.narrow(0, first, count) : at::Tensor()};
}

ChunkRows empty_rows(int64_t num_rows, const at::Tensor& like, bool has_weights) {
  return {at::empty({num_rows, like.size(1)}, like.options()),
          has_weights ? at::empty({num_rows}, like.options().dtype(at::kFloat)) : at::Tensor()};
}

// Waits, and lets go of what was held for the exchange.
std::vector<at::Tensor> finish(std::optional<comm::RowExchange>& started) {
  TORCH_INTERNAL_ASSERT(started.has_value(), "finished before it was started, or twice");
  auto received = started->wait();
  started.reset();
  return received;
}

}  // namespace

CollectiveChunks::CollectiveChunks(ChunkPlan plan,
                                   const ChunkDevice& device,
                                   ChunkStages stages,
                                   ChunkRows tokens,
                                   ChunkRows packed)
    : layout_(std::move(plan)),
      device_(device),
      stages_(stages),
      tokens_(std::move(tokens)),
      send_buffer_(std::move(packed)),
      is_packed_(send_buffer_.rows.defined()),
      dispatches_(layout_.num_chunks()),
      returns_(layout_.num_chunks()) {
  const int64_t num_copies = layout_.plan().slot_of_copy.numel();
  const int64_t num_slots = layout_.segments().num_slots;
  const bool have_weights = tokens_.weights.defined();
  if (!is_packed_) send_buffer_ = empty_rows(num_copies, tokens_.rows, have_weights);
  arrived_ = empty_rows(num_slots, tokens_.rows, have_weights);
  leaving_ = empty_rows(num_slots, tokens_.rows, !have_weights);
}

// Copies of invalid ids, which are not sent, leave the end of a chunk's rows free.
ChunkRows CollectiveChunks::sent_rows(int64_t chunk) {
  const int64_t first = layout_.first_token(chunk), count = layout_.num_tokens_of(chunk);
  const int64_t first_copy = layout_.first_copy(chunk), top_k = layout_.plan().top_k;
  if (!is_packed_) {
    const ChunkRows tokens = cut(tokens_, first, count);
    const Source source = {tokens.rows,
                           tokens.weights,
                           layout_.plan().slot_of_copy.narrow(0, first_copy, count * top_k),
                           top_k};
    device_.pack_rows_into(source, {send_buffer_.rows, send_buffer_.weights}, nullptr);
  }
  return cut(send_buffer_, first_copy, layout_.sizes(chunk).num_sent);
}

void CollectiveChunks::start_dispatch(int64_t chunk) {
  const comm::ScopedStage stage(stages_.dispatch);
  const ExchangeSizes& sizes = layout_.sizes(chunk);
  const ChunkRows sent = sent_rows(chunk);
  dispatches_[chunk].emplace(std::vector<at::Tensor>{sent.rows, sent.weights},
                             sizes.send_rows,
                             sizes.received_rows,
                             layout_.plan().group_name);
  if (chunk == 0) layout_.place(device_);
  if (chunk + 1 < layout_.num_chunks()) return;
  tokens_ = {};  // what is still on its way is held by its exchange
  send_buffer_ = {};
}

void CollectiveChunks::finish_dispatch(int64_t chunk) {
  const comm::ScopedStage stage(stages_.dispatch);
  const auto received = finish(dispatches_[chunk]);
  const Source source = {received[0], received[1], layout_.slot_of_received(chunk), 1};
  const Padding padding = layout_.padding(chunk);
  device_.pack_rows_into(source, {arrived_.rows, arrived_.weights}, &padding);
}

void CollectiveChunks::start_combine(int64_t chunk) {
  if (chunk > 0) finish_return(chunk - 1);
  const comm::ScopedStage stage(stages_.combine);
  const bool has_weights = leaving_.weights.defined();
  if (!returned_.rows.defined()) {
    returned_ = empty_rows(layout_.plan().slot_of_copy.numel(), leaving_.rows, has_weights);
  }
  const ExchangeSizes& sizes = layout_.sizes(chunk);
  const Gathered sent = device_.gather_rows(
      leaving_.rows, given(leaving_.weights), layout_.slot_of_received(chunk), 1);
  const ChunkRows into = cut(returned_, layout_.first_copy(chunk), sizes.num_sent);
  returns_[chunk].emplace(
      std::vector<at::Tensor>{sent.out, has_weights ? sent.weights.reshape({-1}) : at::Tensor()},
      sizes.received_rows,
      sizes.send_rows,
      layout_.plan().group_name,
      std::vector<at::Tensor>{into.rows, into.weights});
}

void CollectiveChunks::finish_return(int64_t chunk) {
  const comm::ScopedStage stage(stages_.combine);
  finish(returns_[chunk]);
}

ChunkRows CollectiveChunks::finish_combine() {
  finish_return(layout_.num_chunks() - 1);
  const Gathered sums = device_.gather_rows(
      returned_.rows, given(returned_.weights), layout_.plan().slot_of_copy, layout_.plan().top_k);
  return {sums.out, returned_.weights.defined() ? sums.weights : at::Tensor()};
}

}  // namespace torch_moe_ep
