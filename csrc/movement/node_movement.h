#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "common/call_operator.h"

// The operators node_dispatch and node_combine, called by name: each is the backward of the other,
// and neither stage includes the other.

namespace torch_moe_ep {

// The plan of a dispatch over nodes; see dispatch/node_dispatch.h.
struct NodePlan {
  at::Tensor row_of_copy;
  at::Tensor slot_of_forwarded;
  at::Tensor slot_of_received;
  at::Tensor expert_offsets;
  at::Tensor counts;
  at::Tensor host_counts;
  int64_t top_k;
  int64_t row_alignment;
  int64_t ranks_per_node;
  std::string group_name;
};

using NodeMoved = std::tuple<at::Tensor, at::Tensor>;  // rows and their weights

// How rows move by this plan, there and back; what movement_autograd.h asks for.
struct NodeMovement {
  NodePlan plan;
  MaybeTensor bytes_sent;  // a counter

  NodeMoved dispatch(const at::Tensor& x, const MaybeTensor& weights) const {
    return call_operator<"node_dispatch", NodeMoved>(x,
                                                     weights,
                                                     plan.row_of_copy,
                                                     plan.slot_of_forwarded,
                                                     plan.slot_of_received,
                                                     plan.expert_offsets,
                                                     plan.counts,
                                                     plan.host_counts,
                                                     plan.top_k,
                                                     plan.row_alignment,
                                                     plan.ranks_per_node,
                                                     plan.group_name,
                                                     bytes_sent);
  }
  NodeMoved combine(const at::Tensor& rows, const MaybeTensor& row_weights) const {
    return call_operator<"node_combine", NodeMoved>(rows,
                                                    row_weights,
                                                    plan.row_of_copy,
                                                    plan.slot_of_forwarded,
                                                    plan.slot_of_received,
                                                    plan.expert_offsets,
                                                    plan.counts,
                                                    plan.host_counts,
                                                    plan.top_k,
                                                    plan.row_alignment,
                                                    plan.ranks_per_node,
                                                    plan.group_name,
                                                    MaybeTensor(),
                                                    bytes_sent);
  }

  void save(torch::autograd::AutogradContext* ctx) const {
    ctx->save_for_backward({plan.row_of_copy,
                            plan.slot_of_forwarded,
                            plan.slot_of_received,
                            plan.expert_offsets,
                            plan.counts,
                            plan.host_counts});
    ctx->saved_data["top_k"] = plan.top_k;
    ctx->saved_data["row_alignment"] = plan.row_alignment;
    ctx->saved_data["ranks_per_node"] = plan.ranks_per_node;
    ctx->saved_data["group_name"] = plan.group_name;
    // Not by save_for_backward: other layers' calls change the counter before this one's backward.
    ctx->saved_data["bytes_sent"] = bytes_sent;
  }
  static NodeMovement saved(torch::autograd::AutogradContext* ctx) {
    auto saved = ctx->get_saved_variables();
    return {{std::move(saved[0]),
             std::move(saved[1]),
             std::move(saved[2]),
             std::move(saved[3]),
             std::move(saved[4]),
             std::move(saved[5]),
             ctx->saved_data["top_k"].toInt(),
             ctx->saved_data["row_alignment"].toInt(),
             ctx->saved_data["ranks_per_node"].toInt(),
             ctx->saved_data["group_name"].toStringRef()},
            ctx->saved_data["bytes_sent"].toOptional<at::Tensor>()};
  }
};

}  // namespace torch_moe_ep
