#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "common/call_operator.h"
#include "common/exchange_sizes.h"

// The operators peer_dispatch and peer_combine, called by name: each is the backward of the other,
// and neither stage includes the other. And how they share the peers' buffer.

namespace torch_moe_ep {

// The plan of a dispatch over peers; see dispatch/peer_dispatch.h.
struct PeerPlan {
  at::Tensor slot_of_copy;
  at::Tensor expert_offsets;
  at::Tensor counts;
  at::Tensor host_counts;
  int64_t top_k;
  int64_t row_alignment;
  int64_t capacity;
  int64_t num_sms;
  std::string group_name;
};

using PeerMoved = std::tuple<at::Tensor, at::Tensor>;  // rows and their weights

// Rows of this rank, and where the rank that has most keeps its own.
struct PeerSlots {
  int64_t num_slots;  // R
  int64_t room;       // slots in the buffer of every rank
};

inline PeerSlots peer_slots(const PeerPlan& plan, int64_t rank) {
  if (plan.capacity > 0) return {plan.capacity, plan.capacity};
  const ExchangeSizes sizes = exchange_sizes(plan.host_counts, rank, plan.row_alignment);
  return {sizes.num_slots, sizes.largest_num_slots};
}

// How rows move by this plan, there and back; what movement_autograd.h asks for.
struct PeerMovement {
  PeerPlan plan;
  // Rows get memory of their own. Else they lie in the buffer, until the group's next operation.
  bool keep = true;

  PeerMoved dispatch(const at::Tensor& x, const MaybeTensor& weights) const {
    return call_operator<"peer_dispatch", PeerMoved>(x,
                                                     weights,
                                                     plan.slot_of_copy,
                                                     plan.expert_offsets,
                                                     plan.counts,
                                                     plan.host_counts,
                                                     plan.top_k,
                                                     plan.row_alignment,
                                                     plan.capacity,
                                                     plan.num_sms,
                                                     plan.group_name,
                                                     keep);
  }
  PeerMoved combine(const at::Tensor& rows, const MaybeTensor& row_weights) const {
    return call_operator<"peer_combine", PeerMoved>(rows,
                                                    row_weights,
                                                    plan.slot_of_copy,
                                                    plan.expert_offsets,
                                                    plan.counts,
                                                    plan.host_counts,
                                                    plan.top_k,
                                                    plan.row_alignment,
                                                    plan.capacity,
                                                    plan.num_sms,
                                                    plan.group_name,
                                                    MaybeTensor());
  }

  void save(torch::autograd::AutogradContext* ctx) const {
    ctx->save_for_backward({plan.slot_of_copy, plan.expert_offsets, plan.counts, plan.host_counts});
    ctx->saved_data["top_k"] = plan.top_k;
    ctx->saved_data["row_alignment"] = plan.row_alignment;
    ctx->saved_data["capacity"] = plan.capacity;
    ctx->saved_data["num_sms"] = plan.num_sms;
    ctx->saved_data["group_name"] = plan.group_name;
  }
  static PeerMovement saved(torch::autograd::AutogradContext* ctx) {
    auto saved = ctx->get_saved_variables();
    return {{std::move(saved[0]),
             std::move(saved[1]),
             std::move(saved[2]),
             std::move(saved[3]),
             ctx->saved_data["top_k"].toInt(),
             ctx->saved_data["row_alignment"].toInt(),
             ctx->saved_data["capacity"].toInt(),
             ctx->saved_data["num_sms"].toInt(),
             ctx->saved_data["group_name"].toStringRef()}};
  }
};

}  // namespace torch_moe_ep
