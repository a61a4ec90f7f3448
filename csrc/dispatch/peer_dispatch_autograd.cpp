#include <torch/library.h>

#include <string>

#include "movement/movement_autograd.h"
#include "movement/peer_movement.h"

namespace torch_moe_ep {
namespace {

// The schema's arguments as a movement, for kRun.
template <auto kRun>
PeerMoved peer_dispatch_by(const at::Tensor& x,
                           const MaybeTensor& weights,
                           const at::Tensor& slot_of_copy,
                           const at::Tensor& expert_offsets,
                           const at::Tensor& counts,
                           const at::Tensor& host_counts,
                           int64_t top_k,
                           int64_t row_alignment,
                           int64_t capacity,
                           int64_t num_sms,
                           const std::string& group_name,
                           bool keep) {
  const PeerMovement movement = {{slot_of_copy,
                                  expert_offsets,
                                  counts,
                                  host_counts,
                                  top_k,
                                  row_alignment,
                                  capacity,
                                  num_sms,
                                  group_name},
                                 keep};
  return kRun(x, weights, movement);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) {
  m.impl("peer_dispatch", &peer_dispatch_by<&dispatch_with_autograd<PeerMovement>>);
}

TORCH_LIBRARY_IMPL(torch_moe_ep, AutocastCUDA, m) {
  m.impl("peer_dispatch", &peer_dispatch_by<&dispatch_with_autocast<PeerMovement, at::kCUDA>>);
}

}  // namespace torch_moe_ep
