#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "comm/collective.h"
#include "comm/label.h"
#include "common/exchange_sizes.h"
#include "common/segments.h"
#include "dispatch/dispatch.h"
#include "dispatch/pack_cpu.h"

namespace torch_moe_ep {
namespace {

constexpr int64_t kBytesPerTask = 1 << 16;

// Zeros behind each expert's copies, up to the next segment.
void write_padding(const Packed& packed, const Padding& padding) {
  const auto count = padding.counts.accessor<int64_t, 2>();
  const int64_t* offsets = padding.expert_offsets.const_data_ptr<int64_t>();
  const int64_t num_local = (padding.expert_offsets.numel() - 1) / padding.num_chunks;
  for (int64_t l = 0; l < num_local; ++l) {
    const int64_t segment = l * padding.num_chunks + padding.chunk;
    int64_t first = offsets[segment];
    for (int64_t source = 0; source < padding.counts.size(0); ++source) {
      first += count[source][padding.rank * num_local + l];
    }
    const int64_t length = offsets[segment + 1] - first;
    packed.rows.narrow(0, first, length).zero_();
    const bool has_weights = packed.row_weights.defined() && packed.row_weights.numel() > 0;
    if (has_weights) packed.row_weights.narrow(0, first, length).zero_();
  }
}

}  // namespace

Packed pack_rows_cpu(const at::Tensor& source,
                     const std::optional<at::Tensor>& weights,
                     const at::Tensor& slot_of_copy,
                     int64_t copies_per_source,
                     int64_t num_slots) {
  return pack_rows_cpu({source.contiguous(),
                        weights ? weights->contiguous() : at::Tensor(),
                        slot_of_copy,
                        copies_per_source},
                       num_slots,
                       nullptr);
}

Packed pack_rows_cpu(const Source& source, int64_t num_slots, const Padding* padding) {
  const bool has_weights = source.weights.defined();
  const Packed packed = {
      at::empty({num_slots, source.rows.size(1)}, source.rows.options()),
      at::empty({has_weights ? num_slots : 0}, source.rows.options().dtype(at::kFloat))};
  pack_rows_into_cpu(source, packed, padding);
  return packed;
}

void pack_rows_into_cpu(const Source& source, const Packed& into, const Padding* padding) {
  const int64_t row_bytes = source.rows.size(1) * static_cast<int64_t>(source.rows.element_size());
  const bool has_weights = source.weights.defined();
  const auto* from = static_cast<const char*>(source.rows.const_data_ptr());
  auto* to = static_cast<char*>(into.rows.mutable_data_ptr());
  const float* weight = has_weights ? source.weights.const_data_ptr<float>() : nullptr;
  float* row_weight = has_weights ? into.row_weights.mutable_data_ptr<float>() : nullptr;
  const int64_t* slot = source.slot_of_copy.const_data_ptr<int64_t>();
  const int64_t copies = source.copies_per_source;
  const int64_t grain = kBytesPerTask / (row_bytes + 1) + 1;
  at::parallel_for(0, source.slot_of_copy.numel(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (slot[n] < 0) continue;
      std::memcpy(to + slot[n] * row_bytes, from + n / copies * row_bytes, row_bytes);
      if (weight != nullptr) row_weight[slot[n]] = weight[n];
    }
  });
  if (padding != nullptr) write_padding(into, *padding);
}

std::tuple<at::Tensor, at::Tensor> dispatch_cpu(const at::Tensor& x,
                                                const std::optional<at::Tensor>& weights,
                                                const at::Tensor& slot_of_copy,
                                                const at::Tensor& slot_of_received,
                                                const at::Tensor& expert_offsets,
                                                const at::Tensor& counts,
                                                const at::Tensor& host_counts,
                                                int64_t top_k,
                                                int64_t row_alignment,
                                                const std::string& group_name,
                                                const std::optional<at::Tensor>& send_rows,
                                                const std::optional<at::Tensor>& send_weights) {
  check_dispatch(x, weights, slot_of_copy, top_k);
  if (group_name.empty()) {
    const int64_t num_slots =
        slot_bound(slot_of_copy.numel(), expert_offsets.numel() - 1, row_alignment);
    const Packed packed = pack_rows_cpu(x, weights, slot_of_copy, top_k, num_slots);
    write_padding(packed, {expert_offsets, counts, 0, row_alignment});
    return {packed.rows, packed.row_weights};
  }
  const comm::ScopedStage stage("dispatch");
  const int64_t rank = comm::group_rank(group_name);
  const ExchangeSizes sizes = exchange_sizes(host_counts, rank, row_alignment);
  Packed sent;
  if (send_rows.has_value()) {
    check_packed(x, weights.has_value(), slot_of_copy, *send_rows, send_weights);
    sent = {*send_rows, send_weights.value_or(at::Tensor())};
  } else {
    sent = pack_rows_cpu(x, weights, slot_of_copy, top_k, sizes.num_sent);
  }
  const auto received =
      comm::all_to_all_rows({sent.rows, weights ? sent.row_weights : at::Tensor()},
                            sizes.send_rows,
                            sizes.received_rows,
                            group_name);
  const Packed packed =
      pack_rows_cpu(received[0], given(received[1]), slot_of_received, 1, sizes.num_slots);
  write_padding(packed, {expert_offsets, counts, rank, row_alignment});
  return {packed.rows, packed.row_weights};
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CPU, m) { m.impl("dispatch", &dispatch_cpu); }

}  // namespace torch_moe_ep
