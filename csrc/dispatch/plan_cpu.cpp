#include <ATen/Functions.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "comm/collective.h"
#include "comm/label.h"
#include "common/exchange_sizes.h"
#include "common/segments.h"
#include "dispatch/dispatch.h"
#include "dispatch/pack_cpu.h"
#include "dispatch/plan_cpu.h"

namespace torch_moe_ep {

at::Tensor count_copies(const at::Tensor& expert_ids, int64_t num_experts) {
  at::Tensor counts = at::zeros({num_experts + 1}, expert_ids.options());
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  const int64_t* ids = expert_ids.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < expert_ids.numel(); ++n) {
    const bool is_valid = ids[n] >= 0 && ids[n] < num_experts;
    ++count[is_valid ? ids[n] : num_experts];
  }
  return counts;
}

void check_ids(const at::Tensor& num_invalid, int64_t num_experts) {
  const auto of_rank = num_invalid.accessor<int64_t, 1>();
  for (int64_t rank = 0; rank < num_invalid.size(0); ++rank) {
    TORCH_CHECK_VALUE(of_rank[rank] == 0,
                      "expert_ids must be in [0, ",
                      num_experts,
                      "), got ",
                      of_rank[rank],
                      " others on rank ",
                      rank,
                      " of the expert-parallel group (check the router)");
  }
}

std::vector<int64_t> offsets_of(const int64_t* lengths, int64_t num_experts, int64_t alignment) {
  std::vector<int64_t> offsets(num_experts + 1, 0);
  for (int64_t e = 0; e < num_experts; ++e) {
    offsets[e + 1] = offsets[e] + round_up(lengths[e], alignment);
  }
  return offsets;
}

at::Tensor place_copies(const at::Tensor& expert_ids, std::vector<int64_t> next_slot) {
  at::Tensor slot_of_copy = at::empty({expert_ids.numel()}, expert_ids.options());
  int64_t* slot = slot_of_copy.mutable_data_ptr<int64_t>();
  const int64_t* ids = expert_ids.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < expert_ids.numel(); ++n) slot[n] = next_slot[ids[n]]++;
  return slot_of_copy;
}

std::vector<int64_t> local_offsets(const at::Tensor& counts, int64_t rank, int64_t alignment) {
  const int64_t num_local = counts.size(1) / counts.size(0);
  const auto rows = counts.accessor<int64_t, 2>();
  std::vector<int64_t> lengths(num_local, 0);
  for (int64_t source = 0; source < counts.size(0); ++source) {
    for (int64_t l = 0; l < num_local; ++l) lengths[l] += rows[source][rank * num_local + l];
  }
  return offsets_of(lengths.data(), num_local, alignment);
}

// Rows arrive rank-major and inside a rank by ascending expert; segments are expert-major.
// Example: 2 ranks, 2 local experts, counts [[1, 2], [3, 1]], alignment 1: received rows
// r0e0 r0e1 r0e1 r1e0 r1e0 r1e0 r1e1 go to slots 0 4 5 1 2 3 6.
at::Tensor place_received(const at::Tensor& counts, int64_t rank, std::vector<int64_t> next_slot) {
  const int64_t num_local = counts.size(1) / counts.size(0);
  const at::Tensor own = counts.narrow(1, rank * num_local, num_local);
  const auto rows = own.accessor<int64_t, 2>();
  at::Tensor slot_of_received = at::empty({own.sum().item<int64_t>()}, counts.options());
  int64_t* slot = slot_of_received.mutable_data_ptr<int64_t>();
  for (int64_t source = 0; source < counts.size(0); ++source) {
    for (int64_t l = 0; l < num_local; ++l) {
      for (int64_t i = rows[source][l]; i > 0; --i) *slot++ = next_slot[l]++;
    }
  }
  return slot_of_received;
}

namespace {

at::Tensor to_tensor(const std::vector<int64_t>& values) {
  return at::tensor(values, at::TensorOptions().dtype(at::kLong));
}

Packed pack_tokens(const at::Tensor& x,
                   const std::optional<at::Tensor>& weights,
                   const at::Tensor& slot_of_copy,
                   int64_t top_k) {
  check_dispatch(x, weights, slot_of_copy, top_k);
  return pack_rows_cpu(x, weights, slot_of_copy, top_k, slot_of_copy.numel());
}

}  // namespace

PlanTensors plan_cpu(const at::Tensor& expert_ids,
                     int64_t num_experts,
                     int64_t row_alignment,
                     int64_t max_rows,
                     const std::string& group_name,
                     const at::Tensor& invalid_flag,
                     const std::optional<at::Tensor>& x,
                     const std::optional<at::Tensor>& weights) {
  check_plan(expert_ids, num_experts, row_alignment, invalid_flag);
  const at::Tensor ids = expert_ids.contiguous();
  const at::Tensor own_counts = count_copies(ids, num_experts);
  const int64_t* lengths = own_counts.const_data_ptr<int64_t>();
  const auto float_options = ids.options().dtype(at::kFloat);
  Packed sent = {at::empty({0, 0}, float_options), at::empty({0}, float_options)};
  if (group_name.empty()) {
    check_ids(own_counts.narrow(0, num_experts, 1), num_experts);
    check_max_rows(slot_bound(ids.numel(), num_experts, row_alignment), max_rows);
    const auto offsets = offsets_of(lengths, num_experts, row_alignment);
    return {place_copies(ids, offsets),
            at::empty({0}, ids.options()),
            to_tensor(offsets),
            own_counts.narrow(0, 0, num_experts).clone().unsqueeze(0),
            at::empty({0, num_experts}, ids.options()),
            sent.rows,
            sent.row_weights};
  }
  const comm::ScopedStage stage("plan");
  check_experts_over_ranks(num_experts, comm::group_size(group_name));
  comm::CountExchange exchange(own_counts, group_name);
  at::Tensor slot_of_copy;
  if (lengths[num_experts] == 0) {  // else every rank raises below
    // Send order is expert order without padding.
    slot_of_copy = place_copies(ids, offsets_of(lengths, num_experts, 1));
    if (x.has_value()) sent = pack_tokens(*x, weights, slot_of_copy, ids.size(1));
  }
  const at::Tensor gathered = exchange.wait().counts;
  check_ids(gathered.select(1, num_experts), num_experts);
  const at::Tensor counts = gathered.narrow(1, 0, num_experts).contiguous();
  const int64_t rank = comm::group_rank(group_name);
  check_max_rows(exchange_sizes(counts, rank, row_alignment).largest_num_slots, max_rows);
  const auto offsets = local_offsets(counts, rank, row_alignment);
  return {slot_of_copy,
          place_received(counts, rank, offsets),
          to_tensor(offsets),
          counts,
          counts.clone(),
          sent.rows,
          sent.row_weights};
}

at::Tensor plan_host_offsets(const at::Tensor& host_counts,
                             int64_t row_alignment,
                             const std::string& group_name) {
  if (host_counts.size(0) == 0) return at::empty({0}, host_counts.options());
  return to_tensor(local_offsets(host_counts, comm::group_rank(group_name), row_alignment));
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CPU, m) {
  m.impl("plan", &plan_cpu);
  m.impl("plan_host_offsets", &plan_host_offsets);
}

}  // namespace torch_moe_ep
