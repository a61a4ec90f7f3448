#include <torch/library.h>

#include <string>

#include "movement/movement.h"
#include "movement/movement_autograd.h"

namespace torch_moe_ep {
namespace {

// The schema's arguments as a movement, for kRun.
template <auto kRun>
Moved dispatch_by(const at::Tensor& x,
                  const MaybeTensor& weights,
                  const at::Tensor& slot_of_copy,
                  const at::Tensor& slot_of_received,
                  const at::Tensor& expert_offsets,
                  const at::Tensor& counts,
                  const at::Tensor& host_counts,
                  int64_t top_k,
                  int64_t row_alignment,
                  const std::string& group_name,
                  const MaybeTensor& send_rows,
                  const MaybeTensor& send_weights) {
  const Movement movement = {{slot_of_copy,
                              slot_of_received,
                              expert_offsets,
                              counts,
                              host_counts,
                              top_k,
                              row_alignment,
                              group_name},
                             {send_rows, send_weights}};
  return kRun(x, weights, movement);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) {
  m.impl("dispatch", &dispatch_by<&dispatch_with_autograd<Movement>>);
}

TORCH_LIBRARY_IMPL(torch_moe_ep, AutocastCPU, m) {
  m.impl("dispatch", &dispatch_by<&dispatch_with_autocast<Movement, at::kCPU>>);
}

TORCH_LIBRARY_IMPL(torch_moe_ep, AutocastCUDA, m) {
  m.impl("dispatch", &dispatch_by<&dispatch_with_autocast<Movement, at::kCUDA>>);
}

}  // namespace torch_moe_ep
