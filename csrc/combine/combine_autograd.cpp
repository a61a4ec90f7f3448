#include <torch/library.h>

#include <string>

#include "movement/movement.h"
#include "movement/movement_autograd.h"

namespace torch_moe_ep {
namespace {

Moved combine_autograd(const at::Tensor& rows,
                       const MaybeTensor& row_weights,
                       const at::Tensor& slot_of_copy,
                       const at::Tensor& slot_of_received,
                       const at::Tensor& expert_offsets,
                       const at::Tensor& counts,
                       const at::Tensor& host_counts,
                       int64_t top_k,
                       int64_t row_alignment,
                       const std::string& group_name,
                       const MaybeTensor& tokens_per_expert) {
  const Movement movement = {{slot_of_copy,
                              slot_of_received,
                              expert_offsets,
                              counts,
                              host_counts,
                              top_k,
                              row_alignment,
                              group_name}};
  return combine_with_autograd(rows, row_weights, movement, tokens_per_expert);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) { m.impl("combine", &combine_autograd); }

}  // namespace torch_moe_ep
