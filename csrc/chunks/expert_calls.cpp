#include "chunks/expert_calls.h"

#include "common/call_operator.h"
#include "common/exchange_sizes.h"

namespace torch_moe_ep {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;

}  // namespace

void call_forward(const ChunkSegments& segments,
                  int64_t chunk,
                  const ChunkRows& rows,
                  const ChunkExperts& experts,
                  const at::Tensor& y,
                  const at::Tensor& z) {
  call_operator<"expert_mlp_forward_chunk", void>(rows.rows,
                                                  rows.weights,
                                                  segments.offsets,
                                                  segments.host_offsets,
                                                  segments.num_chunks,
                                                  chunk,
                                                  experts.gate_up,
                                                  experts.down,
                                                  experts.slots_per_pass,
                                                  y,
                                                  given(z));
}

void call_input_grads(const ChunkSegments& segments,
                      int64_t chunk,
                      const at::Tensor& grad_y,
                      const ChunkRows& rows,
                      const at::Tensor& z,
                      const ChunkExperts& experts,
                      const InputGradients& into) {
  call_operator<"expert_mlp_input_grads_chunk", void>(
      grad_y,
      z.defined() ? MaybeTensor() : given(rows.rows),
      rows.weights,
      given(z),
      segments.offsets,
      segments.host_offsets,
      segments.num_chunks,
      chunk,
      experts.gate_up,
      experts.down,
      into.rows,
      into.row_weights,
      into.z,
      into.activation);
}

WeightGradients call_weight_grads(const ChunkSegments& segments,
                                  const at::Tensor& grad_y,
                                  const at::Tensor& rows,
                                  const InputGradients& of_rows,
                                  double weight_grad_scale) {
  auto [gate_up, down] = call_operator<"expert_mlp_weight_grads", Two>(grad_y,
                                                                       rows,
                                                                       of_rows.z,
                                                                       of_rows.activation,
                                                                       segments.offsets,
                                                                       segments.host_offsets,
                                                                       segments.num_chunks,
                                                                       weight_grad_scale);
  return {gate_up, down};
}

WeightGradients call_backward_chunks(const ChunkSegments& segments,
                                     const at::Tensor& grad_y,
                                     const ChunkRows& rows,
                                     const at::Tensor& z,
                                     const ChunkExperts& experts,
                                     const WeightGradientsWanted& wanted,
                                     const ChunkRows& into) {
  auto [gate_up, down] = call_operator<"expert_mlp_backward_chunks", Two>(grad_y,
                                                                          rows.rows,
                                                                          rows.weights,
                                                                          z,
                                                                          segments.offsets,
                                                                          segments.host_offsets,
                                                                          segments.num_chunks,
                                                                          experts.gate_up,
                                                                          experts.down,
                                                                          wanted.scale,
                                                                          experts.slots_per_pass,
                                                                          into.rows,
                                                                          into.weights,
                                                                          wanted.are_needed);
  return {gate_up, down};
}

}  // namespace torch_moe_ep
