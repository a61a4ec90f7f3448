#include "chunks/expert_calls.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "common/exchange_sizes.h"

namespace torch_moe_ep {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;
using T = const at::Tensor&;
using Maybe = const std::optional<at::Tensor>&;

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

void call_forward(const ChunkSegments& segments,
                  int64_t chunk,
                  const ChunkRows& rows,
                  const ChunkExperts& experts,
                  const at::Tensor& y,
                  const at::Tensor& z) {
  static const auto op = find_operator<void(T, T, T, T, int64_t, int64_t, T, T, int64_t, T, Maybe)>(
      "torch_moe_ep::expert_mlp_forward_chunk");
  op.call(rows.rows,
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
  static const auto op =
      find_operator<void(T, Maybe, T, Maybe, T, T, int64_t, int64_t, T, T, T, T, T, T)>(
          "torch_moe_ep::expert_mlp_input_grads_chunk");
  op.call(grad_y,
          z.defined() ? std::nullopt : given(rows.rows),
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
  static const auto op = find_operator<Two(T, T, T, T, T, T, int64_t, double)>(
      "torch_moe_ep::expert_mlp_weight_grads");
  auto [gate_up, down] = op.call(grad_y,
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
                                     double weight_grad_scale,
                                     const ChunkRows& into) {
  static const auto op = find_operator<Two(T, T, T, T, T, T, int64_t, T, T, double, int64_t, T, T)>(
      "torch_moe_ep::expert_mlp_backward_chunks");
  auto [gate_up, down] = op.call(grad_y,
                                 rows.rows,
                                 rows.weights,
                                 z,
                                 segments.offsets,
                                 segments.host_offsets,
                                 segments.num_chunks,
                                 experts.gate_up,
                                 experts.down,
                                 weight_grad_scale,
                                 experts.slots_per_pass,
                                 into.rows,
                                 into.weights);
  return {gate_up, down};
}

}  // namespace torch_moe_ep
