#include "chunks/pipeline.h"

#include <ATen/Functions.h>

#include <cstdint>

namespace torch_moe_ep {
namespace {

// Gradients of a chunk's rows while the next chunk's travel; those of the weights once, over the
// rows of all chunks, while the last goes back.
WeightGradients pipeline_gradients(ChunkTransport& transport,
                                   const ChunkSegments& segments,
                                   const ChunkExperts& experts,
                                   const KeptRows& kept,
                                   const WeightGradientsWanted& wanted) {
  const bool has_z = kept.z.size(0) == segments.num_slots;
  const auto options = experts.gate_up.options();
  transport.start_dispatch(0);
  const at::Tensor grad_y = transport.arrived().rows;
  const ChunkRows leaving = transport.leaving();
  const InputGradients found = {leaving.rows,
                                leaving.weights,
                                at::empty({segments.num_slots, experts.gate_up.size(1)}, options),
                                at::empty({segments.num_slots, experts.down.size(2)}, options)};
  for (int64_t chunk = 0; chunk < segments.num_chunks; ++chunk) {
    if (chunk + 1 < segments.num_chunks) transport.start_dispatch(chunk + 1);
    transport.finish_dispatch(chunk);
    call_input_grads(
        segments, chunk, grad_y, kept.arrived, has_z ? kept.z : at::Tensor(), experts, found);
    transport.start_combine(chunk);
  }
  if (!wanted.are_needed) return {at::empty({0}, options), at::empty({0}, options)};
  return call_weight_grads(segments, grad_y, kept.arrived.rows, found, wanted.scale);
}

// Passes bound what all rows need at once, so that gradients of rows and weights are made together:
// when every chunk has come.
WeightGradients gradients_in_passes(ChunkTransport& transport,
                                    const ChunkSegments& segments,
                                    const ChunkExperts& experts,
                                    const KeptRows& kept,
                                    const WeightGradientsWanted& wanted) {
  for (int64_t chunk = 0; chunk < segments.num_chunks; ++chunk) transport.start_dispatch(chunk);
  for (int64_t chunk = 0; chunk < segments.num_chunks; ++chunk) transport.finish_dispatch(chunk);
  const WeightGradients of_weights = call_backward_chunks(segments,
                                                          transport.arrived().rows,
                                                          kept.arrived,
                                                          kept.z,
                                                          experts,
                                                          wanted,
                                                          transport.leaving());
  for (int64_t chunk = 0; chunk < segments.num_chunks; ++chunk) transport.start_combine(chunk);
  return of_weights;
}

}  // namespace

ChunkForward run_forward(ChunkTransport& transport,
                         const ChunkSegments& segments,
                         const ChunkExperts& experts,
                         bool keep_rows,
                         bool keep_gate_up) {
  const int64_t num_slots = segments.num_slots;
  const bool is_one_pass = experts.slots_per_pass <= 0 || experts.slots_per_pass >= num_slots;
  const auto options = experts.gate_up.options();
  const int64_t hidden = experts.gate_up.size(2), width = experts.gate_up.size(1);
  transport.start_dispatch(0);
  const ChunkRows arrived = transport.arrived();
  const at::Tensor y = transport.leaving().rows;
  const bool has_z = keep_gate_up && is_one_pass;
  const at::Tensor z = has_z ? at::empty({num_slots, width}, options) : at::Tensor();
  for (int64_t chunk = 0; chunk < segments.num_chunks; ++chunk) {
    if (chunk + 1 < segments.num_chunks) transport.start_dispatch(chunk + 1);
    transport.finish_dispatch(chunk);
    call_forward(segments, chunk, arrived, experts, y, z);
    transport.start_combine(chunk);
  }
  ChunkRows rows = keep_rows || has_z ? transport.kept(keep_rows) : ChunkRows{};
  if (!rows.rows.defined()) rows.rows = at::empty({0, hidden}, options);
  if (!rows.weights.defined()) rows.weights = at::empty({0}, options.dtype(at::kFloat));
  const KeptRows kept = {rows, has_z ? z : at::empty({0, width}, options)};
  return {transport.finish_combine().rows, kept};
}

ChunkBackward run_backward(ChunkTransport& transport,
                           const ChunkSegments& segments,
                           const ChunkExperts& experts,
                           const KeptRows& kept,
                           const WeightGradientsWanted& wanted) {
  const auto run = experts.slots_per_pass > 0 ? gradients_in_passes : pipeline_gradients;
  const WeightGradients of_weights = run(transport, segments, experts, kept, wanted);
  const ChunkRows of_tokens = transport.finish_combine();
  return {of_tokens.rows, of_tokens.weights, of_weights.gate_up, of_weights.down};
}

}  // namespace torch_moe_ep
