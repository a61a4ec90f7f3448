#include <torch/library.h>

#include <optional>
#include <string>

#include "combine/node_combine.h"

namespace torch_moe_ep {
namespace {

NodeMoved node_combine_cpu(const at::Tensor& rows,
                           const std::optional<at::Tensor>& row_weights,
                           const at::Tensor& row_of_copy,
                           const at::Tensor& slot_of_forwarded,
                           const at::Tensor& slot_of_received,
                           const at::Tensor& expert_offsets,
                           const at::Tensor& counts,
                           const at::Tensor& host_counts,
                           int64_t top_k,
                           int64_t row_alignment,
                           int64_t ranks_per_node,
                           const std::string& group_name,
                           const std::optional<at::Tensor>& /*tokens_per_expert*/,
                           const std::optional<at::Tensor>& bytes_sent) {
  const NodePlan plan = {row_of_copy,
                         slot_of_forwarded,
                         slot_of_received,
                         expert_offsets,
                         counts,
                         host_counts,
                         top_k,
                         row_alignment,
                         ranks_per_node,
                         group_name};
  return combine_over_nodes(rows, row_weights, plan, bytes_sent, &gather_rows_cpu);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CPU, m) { m.impl("node_combine", &node_combine_cpu); }

}  // namespace torch_moe_ep
