#include <torch/library.h>

#include <string>

#include "movement/movement_autograd.h"
#include "movement/node_movement.h"

namespace torch_moe_ep {
namespace {

NodeMoved node_combine_autograd(const at::Tensor& rows,
                                const MaybeTensor& row_weights,
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
                                const MaybeTensor& tokens_per_expert,
                                const MaybeTensor& bytes_sent) {
  const NodeMovement movement = {{row_of_copy,
                                  slot_of_forwarded,
                                  slot_of_received,
                                  expert_offsets,
                                  counts,
                                  host_counts,
                                  top_k,
                                  row_alignment,
                                  ranks_per_node,
                                  group_name},
                                 bytes_sent};
  return combine_with_autograd(rows, row_weights, movement, tokens_per_expert);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) { m.impl("node_combine", &node_combine_autograd); }

}  // namespace torch_moe_ep
