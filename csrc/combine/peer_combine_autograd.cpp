#include <torch/library.h>

#include <string>

#include "movement/movement_autograd.h"
#include "movement/peer_movement.h"

namespace torch_moe_ep {
namespace {

PeerMoved peer_combine_autograd(const at::Tensor& rows,
                                const MaybeTensor& row_weights,
                                const at::Tensor& slot_of_copy,
                                const at::Tensor& expert_offsets,
                                const at::Tensor& counts,
                                const at::Tensor& host_counts,
                                int64_t top_k,
                                int64_t row_alignment,
                                int64_t capacity,
                                int64_t num_sms,
                                const std::string& group_name,
                                const MaybeTensor& tokens_per_expert) {
  const PeerMovement movement = {{slot_of_copy,
                                  expert_offsets,
                                  counts,
                                  host_counts,
                                  top_k,
                                  row_alignment,
                                  capacity,
                                  num_sms,
                                  group_name}};
  return combine_with_autograd(rows, row_weights, movement, tokens_per_expert);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) { m.impl("peer_combine", &peer_combine_autograd); }

}  // namespace torch_moe_ep
