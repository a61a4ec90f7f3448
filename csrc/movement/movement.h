#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "common/call_operator.h"

// The operators dispatch and combine, called by name: each is the backward of the other, and
// neither stage includes the other.

namespace torch_moe_ep {

// The plan as dispatch and combine take it; see dispatch/dispatch.h.
struct Plan {
  at::Tensor slot_of_copy;
  at::Tensor slot_of_received;
  at::Tensor expert_offsets;
  at::Tensor counts;
  at::Tensor host_counts;
  int64_t top_k;
  int64_t row_alignment;
  std::string group_name;
};

using Moved = std::tuple<at::Tensor, at::Tensor>;  // rows and their weights

// What a plan packed; dispatch packs where there is none.
struct SendBuffer {
  MaybeTensor rows;
  MaybeTensor weights;
};

// How rows move by this plan, there and back; what movement_autograd.h asks for.
struct Movement {
  Plan plan;
  SendBuffer packed = {};  // of a forward

  Moved dispatch(const at::Tensor& x, const MaybeTensor& weights) const {
    return call_operator<"dispatch", Moved>(x,
                                            weights,
                                            plan.slot_of_copy,
                                            plan.slot_of_received,
                                            plan.expert_offsets,
                                            plan.counts,
                                            plan.host_counts,
                                            plan.top_k,
                                            plan.row_alignment,
                                            plan.group_name,
                                            packed.rows,
                                            packed.weights);
  }
  Moved combine(const at::Tensor& rows, const MaybeTensor& row_weights) const {
    return call_operator<"combine", Moved>(rows,
                                           row_weights,
                                           plan.slot_of_copy,
                                           plan.slot_of_received,
                                           plan.expert_offsets,
                                           plan.counts,
                                           plan.host_counts,
                                           plan.top_k,
                                           plan.row_alignment,
                                           plan.group_name,
                                           MaybeTensor());
  }

  void save(torch::autograd::AutogradContext* ctx) const {
    ctx->save_for_backward({plan.slot_of_copy,
                            plan.slot_of_received,
                            plan.expert_offsets,
                            plan.counts,
                            plan.host_counts});
    ctx->saved_data["top_k"] = plan.top_k;
    ctx->saved_data["row_alignment"] = plan.row_alignment;
    ctx->saved_data["group_name"] = plan.group_name;
  }
  static Movement saved(torch::autograd::AutogradContext* ctx) {
    auto saved = ctx->get_saved_variables();
    return {{std::move(saved[0]),
             std::move(saved[1]),
             std::move(saved[2]),
             std::move(saved[3]),
             std::move(saved[4]),
             ctx->saved_data["top_k"].toInt(),
             ctx->saved_data["row_alignment"].toInt(),
             ctx->saved_data["group_name"].toStringRef()}};
  }
};

}  // namespace torch_moe_ep
