// The operators of expert_mlp for a device, from what it computes (compute.h): those of
// expert_mlp.h, and those for tokens in C chunks whose rows lie in buffers of all chunks
// (RowSegments: segment l C + c holds the rows of local expert l in chunk c):
//
// expert_mlp_forward_chunk(rows, ..., chunk, y, z) writes y, and z where it is given, of the
//   chunk's rows. z is given in one pass only.
// expert_mlp_input_grads_chunk(grad_y, rows or z, ..., chunk, grad_rows, grad_row_weights, grad_z,
//   activation) writes these four of the chunk's rows: the part of backward that needs no other
//   rows. In one pass.
// expert_mlp_weight_grads(grad_y, rows, grad_z, activation, ...) -> grad_gate_up, grad_down: its
//   other part, over the rows of all chunks in their order.
// expert_mlp_backward_chunks(...) is expert_mlp_backward over the rows of all chunks that writes
//   grad_rows and grad_row_weights into tensors that are there.
//
// Rows of other chunks are neither read nor written: they may be on their way. What is written is
// contiguous. segment_offsets int64 [L C + 1], host_offsets the same on the CPU or [0]; else as
// expert_mlp.h has it.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "expert_mlp/compute.h"
#include "expert_mlp/expert_mlp.h"

namespace torch_moe_ep {

template <const MlpCompute& kCompute>
std::tuple<at::Tensor, at::Tensor> expert_mlp_forward(const at::Tensor& rows,
                                                      const at::Tensor& row_weights,
                                                      const at::Tensor& expert_offsets,
                                                      const at::Tensor& host_offsets,
                                                      const at::Tensor& gate_up,
                                                      const at::Tensor& down,
                                                      int64_t slots_per_pass) {
  check_expert_mlp(rows, row_weights, expert_offsets, host_offsets, gate_up, down);
  const MlpInputs inputs = {rows, row_weights, gate_up, down};
  const auto [y, z] = kCompute.forward(all_chunks(expert_offsets, host_offsets, 1),
                                       inputs.contiguous(),
                                       slots_per_pass,
                                       /*keeps_z=*/true,
                                       {});
  return {y, z.defined() ? z : at::empty({0, gate_up.size(1)}, rows.options())};
}

// Both forms of backward; of `into` the tensors that weight gradients are added to.
template <const MlpCompute& kCompute>
MlpGradients checked_backward(const at::Tensor& grad_y,
                              const MlpInputs& inputs,
                              const at::Tensor& z,
                              const at::Tensor& expert_offsets,
                              const at::Tensor& host_offsets,
                              double weight_grad_scale,
                              int64_t slots_per_pass,
                              bool needs_weight_grads,
                              MlpGradients into) {
  check_expert_mlp(
      inputs.rows, inputs.row_weights, expert_offsets, host_offsets, inputs.gate_up, inputs.down);
  check_expert_mlp_backward(grad_y, inputs.rows, z, inputs.gate_up);
  return kCompute.backward(all_chunks(expert_offsets, host_offsets, 1),
                           grad_y.contiguous(),
                           inputs.contiguous(),
                           z.contiguous(),
                           weight_grad_scale,
                           slots_per_pass,
                           needs_weight_grads,
                           std::move(into));
}

// [0] in place of a gradient that nobody needs.
inline at::Tensor given_or_empty(const at::Tensor& gradient, const at::Tensor& weight) {
  return gradient.defined() ? gradient : at::empty({0}, weight.options());
}

template <const MlpCompute& kCompute>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_mlp_backward(
    const at::Tensor& grad_y,
    const at::Tensor& rows,
    const at::Tensor& row_weights,
    const at::Tensor& z,
    const at::Tensor& expert_offsets,
    const at::Tensor& host_offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    double weight_grad_scale,
    int64_t slots_per_pass,
    bool needs_weight_grads) {
  const MlpGradients found = checked_backward<kCompute>(grad_y,
                                                        {rows, row_weights, gate_up, down},
                                                        z,
                                                        expert_offsets,
                                                        host_offsets,
                                                        weight_grad_scale,
                                                        slots_per_pass,
                                                        needs_weight_grads,
                                                        {});
  return {found.rows,
          found.row_weights,
          given_or_empty(found.gate_up, gate_up),
          given_or_empty(found.down, down)};
}

template <const MlpCompute& kCompute>
std::tuple<at::Tensor, at::Tensor> expert_mlp_backward_add(const at::Tensor& grad_y,
                                                           const at::Tensor& rows,
                                                           const at::Tensor& row_weights,
                                                           const at::Tensor& z,
                                                           const at::Tensor& expert_offsets,
                                                           const at::Tensor& host_offsets,
                                                           const at::Tensor& gate_up,
                                                           const at::Tensor& down,
                                                           double weight_grad_scale,
                                                           int64_t slots_per_pass,
                                                           const at::Tensor& main_grad_gate_up,
                                                           const at::Tensor& main_grad_down) {
  check_main_grads(main_grad_gate_up, main_grad_down, gate_up, down);
  const MlpGradients found =
      checked_backward<kCompute>(grad_y,
                                 {rows, row_weights, gate_up, down},
                                 z,
                                 expert_offsets,
                                 host_offsets,
                                 weight_grad_scale,
                                 slots_per_pass,
                                 /*needs_weight_grads=*/true,
                                 {{}, {}, main_grad_gate_up, main_grad_down});
  return {found.rows, found.row_weights};
}

// A tensor that results are written into, of `like`'s dtype or fp32.
inline void check_target(const at::Tensor& target,
                         const char* name,
                         const at::Tensor& like,
                         at::IntArrayRef sizes,
                         at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      target.sizes() == sizes && target.scalar_type() == dtype && target.is_contiguous(),
      name,
      " is written and must be contiguous ",
      dtype,
      " ",
      sizes,
      ", got ",
      target.scalar_type(),
      " ",
      target.sizes(),
      " with strides ",
      target.strides());
  check_same_device(target, name, like, "its rows");
}

inline void check_chunk(int64_t chunk, int64_t num_chunks) {
  TORCH_CHECK_VALUE(chunk >= 0 && chunk < num_chunks,
                    "chunk must be one of the ",
                    num_chunks,
                    " chunks, from 0 on, got ",
                    chunk);
}

template <const MlpCompute& kCompute>
void expert_mlp_forward_chunk(const at::Tensor& rows,
                              const at::Tensor& row_weights,
                              const at::Tensor& segment_offsets,
                              const at::Tensor& host_offsets,
                              int64_t num_chunks,
                              int64_t chunk,
                              const at::Tensor& gate_up,
                              const at::Tensor& down,
                              int64_t slots_per_pass,
                              const at::Tensor& y,
                              const std::optional<at::Tensor>& z) {
  check_chunk(chunk, num_chunks);
  check_expert_mlp(rows, row_weights, segment_offsets, host_offsets, gate_up, down, num_chunks);
  check_target(y, "y", rows, rows.sizes(), rows.scalar_type());
  if (z) check_target(*z, "z", rows, {rows.size(0), gate_up.size(1)}, rows.scalar_type());
  const MlpInputs inputs = {rows, row_weights, gate_up, down};
  kCompute.forward(one_chunk(segment_offsets, host_offsets, num_chunks, chunk),
                   inputs.contiguous(),
                   slots_per_pass,
                   z.has_value(),
                   {y, z.value_or(at::Tensor())});
}

template <const MlpCompute& kCompute>
void expert_mlp_input_grads_chunk(const at::Tensor& grad_y,
                                  const std::optional<at::Tensor>& rows,
                                  const at::Tensor& row_weights,
                                  const std::optional<at::Tensor>& z,
                                  const at::Tensor& segment_offsets,
                                  const at::Tensor& host_offsets,
                                  int64_t num_chunks,
                                  int64_t chunk,
                                  const at::Tensor& gate_up,
                                  const at::Tensor& down,
                                  const at::Tensor& grad_rows,
                                  const at::Tensor& grad_row_weights,
                                  const at::Tensor& grad_z,
                                  const at::Tensor& activation) {
  check_chunk(chunk, num_chunks);
  check_expert_mlp(grad_y, row_weights, segment_offsets, host_offsets, gate_up, down, num_chunks);
  const at::Tensor source = checked_rows_or_z(grad_y, rows, z, gate_up).contiguous();
  const int64_t num_slots = grad_y.size(0);
  const at::ScalarType dtype = grad_y.scalar_type();
  check_target(grad_rows, "grad_rows", grad_y, grad_y.sizes(), dtype);
  check_target(grad_row_weights, "grad_row_weights", grad_y, {num_slots}, at::kFloat);
  check_target(grad_z, "grad_z", grad_y, {num_slots, gate_up.size(1)}, dtype);
  check_target(activation, "activation", grad_y, {num_slots, down.size(2)}, dtype);
  const MlpInputs inputs = {
      rows ? source : grad_y, row_weights, gate_up, down};  // rows are not read where z is there
  kCompute.input_grads(one_chunk(segment_offsets, host_offsets, num_chunks, chunk),
                       grad_y.contiguous(),
                       inputs.contiguous(),
                       z ? source : at::Tensor(),
                       {grad_rows, grad_row_weights, grad_z, activation});
}

template <const MlpCompute& kCompute>
std::tuple<at::Tensor, at::Tensor> expert_mlp_weight_grads(const at::Tensor& grad_y,
                                                           const at::Tensor& rows,
                                                           const at::Tensor& grad_z,
                                                           const at::Tensor& activation,
                                                           const at::Tensor& segment_offsets,
                                                           const at::Tensor& host_offsets,
                                                           int64_t num_chunks,
                                                           double weight_grad_scale) {
  check_segment_offsets(rows, segment_offsets, host_offsets, num_chunks);
  check_expert_mlp_weight_grads(grad_y, rows, grad_z, activation);
  const MlpGradients found =
      kCompute.weight_grads(all_chunks(segment_offsets, host_offsets, num_chunks),
                            grad_y.contiguous(),
                            rows.contiguous(),
                            grad_z.contiguous(),
                            activation.contiguous(),
                            weight_grad_scale);
  return {found.gate_up, found.down};
}

template <const MlpCompute& kCompute>
std::tuple<at::Tensor, at::Tensor> expert_mlp_backward_chunks(const at::Tensor& grad_y,
                                                              const at::Tensor& rows,
                                                              const at::Tensor& row_weights,
                                                              const at::Tensor& z,
                                                              const at::Tensor& segment_offsets,
                                                              const at::Tensor& host_offsets,
                                                              int64_t num_chunks,
                                                              const at::Tensor& gate_up,
                                                              const at::Tensor& down,
                                                              double weight_grad_scale,
                                                              int64_t slots_per_pass,
                                                              const at::Tensor& grad_rows,
                                                              const at::Tensor& grad_row_weights,
                                                              bool needs_weight_grads) {
  check_expert_mlp(rows, row_weights, segment_offsets, host_offsets, gate_up, down, num_chunks);
  check_expert_mlp_backward(grad_y, rows, z, gate_up);
  check_target(grad_rows, "grad_rows", rows, rows.sizes(), rows.scalar_type());
  check_target(grad_row_weights, "grad_row_weights", rows, row_weights.sizes(), at::kFloat);
  const MlpInputs inputs = {rows, row_weights, gate_up, down};
  const MlpGradients found =
      kCompute.backward(all_chunks(segment_offsets, host_offsets, num_chunks),
                        grad_y.contiguous(),
                        inputs.contiguous(),
                        z.contiguous(),
                        weight_grad_scale,
                        slots_per_pass,
                        needs_weight_grads,
                        {grad_rows, grad_row_weights, {}, {}});
  return {given_or_empty(found.gate_up, gate_up), given_or_empty(found.down, down)};
}

template <const MlpCompute& kCompute>
void implement_operators(torch::Library& library) {
  library.impl("expert_mlp_forward", &expert_mlp_forward<kCompute>);
  library.impl("expert_mlp_backward", &expert_mlp_backward<kCompute>);
  library.impl("expert_mlp_backward_add", &expert_mlp_backward_add<kCompute>);
  library.impl("expert_mlp_forward_chunk", &expert_mlp_forward_chunk<kCompute>);
  library.impl("expert_mlp_input_grads_chunk", &expert_mlp_input_grads_chunk<kCompute>);
  library.impl("expert_mlp_weight_grads", &expert_mlp_weight_grads<kCompute>);
  library.impl("expert_mlp_backward_chunks", &expert_mlp_backward_chunks<kCompute>);
}

}  // namespace torch_moe_ep
