#include "chunks/pipeline.h"

#include <ATen/Functions.h>

#include <optional>
#include <tuple>

#include "chunks/expert_calls.h"

namespace torch_moe_ep {
namespace {

// A buffer in the order of the whole, filled chunk by chunk; padding rows are zeros.
class WholeRows {
 public:
  WholeRows(const ChunkLayout& layout,
            const ChunkDevice& device,
            int64_t columns,
            const at::TensorOptions& options,
            bool has_weights)
      : layout_(layout), device_(device) {
    const int64_t num_slots = layout.num_slots_of_whole();
    whole_.rows = at::empty({num_slots, columns}, options);
    if (has_weights) whole_.row_weights = at::empty({num_slots}, options.dtype(at::kFloat));
    const at::Tensor nothing = layout.whole_of_slot(0).narrow(0, 0, 0);
    const Padding padding = layout.whole_padding();
    const at::Tensor no_weights = has_weights ? whole_.row_weights.narrow(0, 0, 0) : at::Tensor();
    device.pack_rows_into({whole_.rows.narrow(0, 0, 0), no_weights, nothing, 1}, whole_, &padding);
  }

  void put(int64_t chunk, const at::Tensor& rows, const at::Tensor& weights = {}) {
    device_.pack_rows_into({rows, weights, layout_.whole_of_slot(chunk), 1}, whole_, nullptr);
  }

  const at::Tensor& rows() const { return whole_.rows; }
  const at::Tensor& weights() const { return whole_.row_weights; }

 private:
  const ChunkLayout& layout_;
  const ChunkDevice& device_;
  Packed whole_;
};

// The chunk's rows of the whole, and their weights; zeros for padding.
ChunkRows take(const ChunkLayout& layout,
               const ChunkDevice& device,
               int64_t chunk,
               const at::Tensor& rows,
               const at::Tensor& weights) {
  const Gathered taken = device.gather_rows(rows, weights, layout.whole_of_slot(chunk), 1);
  return {taken.out, taken.weights.reshape({-1})};
}

// A chunk's segments, as the operators of expert_mlp take them.
ExpertSegments segments_of(const ChunkLayout& layout, int64_t chunk) {
  return {layout.expert_offsets(chunk), layout.host_offsets(chunk)};
}

ExpertSegments segments_of_whole(const ChunkLayout& layout) {
  return {layout.whole_expert_offsets(), layout.whole_host_offsets()};
}

struct WeightGradients {
  at::Tensor gate_up;
  at::Tensor down;
};

// Gradients of a chunk's rows while the next chunk's travel; what the weights' gradients need is
// put together, and used once when all of it is there.
WeightGradients pipeline_gradients(ChunkTransport& transport,
                                   ChunkLayout& layout,
                                   const ChunkDevice& device,
                                   const ChunkExperts& experts,
                                   const KeptRows& kept,
                                   double weight_grad_scale) {
  const bool has_z = kept.z.size(0) == kept.rows.size(0);
  transport.start_dispatch(0);
  layout.place(device);
  const auto options = kept.rows.options();
  WholeRows grad_y(layout, device, kept.rows.size(1), options, false);
  WholeRows grad_z(layout, device, experts.gate_up.size(1), options, false);
  WholeRows activation(layout, device, experts.down.size(2), options, false);
  for (int64_t chunk = 0; chunk < layout.num_chunks(); ++chunk) {
    if (chunk + 1 < layout.num_chunks()) transport.start_dispatch(chunk + 1);
    const ChunkRows saved =
        take(layout, device, chunk, has_z ? kept.z : kept.rows, kept.row_weights);
    const ChunkRows upstream = transport.finish_dispatch(chunk);
    const InputGradients found =
        call_input_grads(upstream.rows,
                         has_z ? std::nullopt : std::optional<at::Tensor>(saved.rows),
                         saved.weights,
                         has_z ? std::optional<at::Tensor>(saved.rows) : std::nullopt,
                         segments_of(layout, chunk),
                         experts.gate_up,
                         experts.down);
    transport.start_combine(chunk, {found.rows, found.row_weights});
    grad_y.put(chunk, upstream.rows);
    grad_z.put(chunk, found.z);
    activation.put(chunk, found.activation);
  }
  auto [gate_up, down] = call_weight_grads(grad_y.rows(),
                                           kept.rows,
                                           grad_z.rows(),
                                           activation.rows(),
                                           segments_of_whole(layout),
                                           weight_grad_scale);
  return {gate_up, down};
}

// Passes bound what all rows need at once, so that gradients of rows and weights are made together:
// when every chunk has come.
WeightGradients gradients_in_passes(ChunkTransport& transport,
                                    ChunkLayout& layout,
                                    const ChunkDevice& device,
                                    const ChunkExperts& experts,
                                    const KeptRows& kept,
                                    double weight_grad_scale) {
  for (int64_t chunk = 0; chunk < layout.num_chunks(); ++chunk) transport.start_dispatch(chunk);
  layout.place(device);
  WholeRows grad_y(layout, device, kept.rows.size(1), kept.rows.options(), false);
  for (int64_t chunk = 0; chunk < layout.num_chunks(); ++chunk) {
    grad_y.put(chunk, transport.finish_dispatch(chunk).rows);
  }
  auto [rows, row_weights, gate_up, down] = call_expert_mlp_backward(grad_y.rows(),
                                                                     kept.rows,
                                                                     kept.row_weights,
                                                                     kept.z,
                                                                     segments_of_whole(layout),
                                                                     experts.gate_up,
                                                                     experts.down,
                                                                     weight_grad_scale,
                                                                     experts.slots_per_pass);
  for (int64_t chunk = 0; chunk < layout.num_chunks(); ++chunk) {
    transport.start_combine(chunk, take(layout, device, chunk, rows, row_weights));
  }
  return {gate_up, down};
}

}  // namespace

ChunkForward run_forward(ChunkTransport& transport,
                         ChunkLayout& layout,
                         const ChunkDevice& device,
                         const ChunkExperts& experts,
                         bool keep_rows,
                         bool keep_gate_up) {
  const int64_t num_slots = layout.num_slots_of_whole();
  const bool is_one_pass = experts.slots_per_pass <= 0 || experts.slots_per_pass >= num_slots;
  const auto options = experts.gate_up.options();
  const int64_t hidden = experts.gate_up.size(2), width = experts.gate_up.size(1);
  transport.start_dispatch(0);
  layout.place(device);
  std::optional<WholeRows> rows, z;
  if (keep_rows) rows.emplace(layout, device, hidden, options, true);
  if (keep_rows && keep_gate_up && is_one_pass) z.emplace(layout, device, width, options, false);
  for (int64_t chunk = 0; chunk < layout.num_chunks(); ++chunk) {
    if (chunk + 1 < layout.num_chunks()) transport.start_dispatch(chunk + 1);
    const ChunkRows arrived = transport.finish_dispatch(chunk);
    const auto [y, chunk_z] = call_expert_mlp_forward(arrived.rows,
                                                      arrived.weights,
                                                      segments_of(layout, chunk),
                                                      experts.gate_up,
                                                      experts.down,
                                                      experts.slots_per_pass);
    transport.start_combine(chunk, {y, at::Tensor()});
    if (rows) rows->put(chunk, arrived.rows, arrived.weights);
    if (z) z->put(chunk, chunk_z);
  }
  const KeptRows kept = {rows ? rows->rows() : at::empty({0, hidden}, options),
                         rows ? rows->weights() : at::empty({0}, options.dtype(at::kFloat)),
                         z ? z->rows() : at::empty({0, width}, options)};
  return {transport.finish_combine().rows, kept};
}

ChunkBackward run_backward(ChunkTransport& transport,
                           ChunkLayout& layout,
                           const ChunkDevice& device,
                           const ChunkExperts& experts,
                           const KeptRows& kept,
                           double weight_grad_scale) {
  const auto run = experts.slots_per_pass > 0 ? gradients_in_passes : pipeline_gradients;
  const WeightGradients of_weights =
      run(transport, layout, device, experts, kept, weight_grad_scale);
  const ChunkRows of_tokens = transport.finish_combine();
  return {of_tokens.rows, of_tokens.weights, of_weights.gate_up, of_weights.down};
}

}  // namespace torch_moe_ep
