#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "chunks/chunks.h"
#include "comm/collective.h"
#include "comm/label.h"
#include "common/call_operator.h"
#include "common/checks.h"

namespace torch_moe_ep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// What backward is to have. Rows are what z is made of, and the gradients of trained weights.
struct Keeps {
  bool rows;
  bool gate_up;
};

// How the experts compute, besides their weights.
struct Options {
  double weight_grad_scale;
  int64_t slots_per_pass;
  bool recompute_gate_up;
};

Four call_forward(const at::Tensor& x,
                  const at::Tensor& weights,
                  const ChunkPlan& plan,
                  const at::Tensor& gate_up,
                  const at::Tensor& down,
                  int64_t slots_per_pass,
                  const MaybeTensor& send_rows,
                  const MaybeTensor& send_weights,
                  bool keep_rows,
                  bool keep_gate_up) {
  return call_operator<"chunked_experts_forward", Four>(x,
                                                        weights,
                                                        plan.slot_of_copy,
                                                        plan.counts,
                                                        plan.host_counts,
                                                        gate_up,
                                                        down,
                                                        plan.top_k,
                                                        plan.row_alignment,
                                                        plan.group_name,
                                                        given(plan.segment_offsets),
                                                        plan.capacity,
                                                        plan.num_sms,
                                                        slots_per_pass,
                                                        send_rows,
                                                        send_weights,
                                                        keep_rows,
                                                        keep_gate_up);
}

// saved: rows, row_weights, z, slot_of_copy, counts, host_counts, gate_up, down, segment_offsets.
Four call_backward(const at::Tensor& grad_output,
                   const variable_list& saved,
                   AutogradContext* ctx,
                   bool needs_weight_grads) {
  return call_operator<"chunked_experts_backward", Four>(
      grad_output,
      saved[0],
      saved[1],
      saved[2],
      saved[3],
      saved[4],
      saved[5],
      saved[6],
      saved[7],
      ctx->saved_data["top_k"].toInt(),
      ctx->saved_data["row_alignment"].toInt(),
      ctx->saved_data["group_name"].toStringRef(),
      given(saved[8]),
      ctx->saved_data["capacity"].toInt(),
      ctx->saved_data["num_sms"].toInt(),
      ctx->saved_data["weight_grad_scale"].toDouble(),
      ctx->saved_data["slots_per_pass"].toInt(),
      needs_weight_grads);
}

class ChunkedExperts : public torch::autograd::Function<ChunkedExperts> {
 public:
  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& x,
                            const at::Tensor& weights,
                            const at::Tensor& gate_up,
                            const at::Tensor& down,
                            const ChunkPlan& plan,
                            const Options& options,
                            const Keeps& keeps,
                            const ChunkRows& packed,
                            const MaybeTensor& tokens_per_expert) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, rows, row_weights, z] = call_forward(x,
                                                       weights,
                                                       plan,
                                                       gate_up,
                                                       down,
                                                       options.slots_per_pass,
                                                       given(packed.rows),
                                                       given(packed.weights),
                                                       keeps.rows,
                                                       keeps.gate_up);
    ctx->save_for_backward({rows,
                            row_weights,
                            z,
                            plan.slot_of_copy,
                            plan.counts,
                            plan.host_counts,
                            gate_up,
                            down,
                            plan.segment_offsets});
    ctx->saved_data["top_k"] = plan.top_k;
    ctx->saved_data["row_alignment"] = plan.row_alignment;
    ctx->saved_data["group_name"] = plan.group_name;
    ctx->saved_data["capacity"] = plan.capacity;
    ctx->saved_data["num_sms"] = plan.num_sms;
    ctx->saved_data["weight_grad_scale"] = options.weight_grad_scale;
    ctx->saved_data["slots_per_pass"] = options.slots_per_pass;
    ctx->saved_data["layer"] = static_cast<int64_t>(comm::current_label().layer);
    // Not by save_for_backward: other micro-batches change the counter before this one's backward.
    ctx->saved_data["tokens_per_expert"] = tokens_per_expert;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    // May run a checkpointed forward again: before the label.
    const variable_list saved = ctx->get_saved_variables();
    const auto layer = static_cast<int32_t>(ctx->saved_data["layer"].toInt());
    const comm::ScopedLabel label({layer, nullptr});
    // Of the tensors among forward's arguments gate_up is the third, down the fourth.
    const bool needs_weight_grads = ctx->needs_input_grad(2) || ctx->needs_input_grad(3);
    auto [grad_x, grad_weights, grad_gate_up, grad_down] =
        call_backward(grads[0], saved, ctx, needs_weight_grads);
    if (!needs_weight_grads) grad_gate_up = grad_down = at::Tensor();
    const auto counter = ctx->saved_data["tokens_per_expert"].toOptional<at::Tensor>();
    if (counter.has_value()) {
      const int64_t rank = comm::group_rank(ctx->saved_data["group_name"].toStringRef());
      counter->add_(saved[4].select(1, rank).sum(0));
    }
    const at::Tensor none;
    return {grad_x, grad_weights, grad_gate_up, grad_down, none, none, none, none, none};
  }
};

at::Tensor chunked_experts_autograd(const at::Tensor& x,
                                    const at::Tensor& weights,
                                    const at::Tensor& slot_of_copy,
                                    const at::Tensor& counts,
                                    const at::Tensor& host_counts,
                                    const at::Tensor& gate_up,
                                    const at::Tensor& down,
                                    int64_t top_k,
                                    int64_t row_alignment,
                                    const std::string& group_name,
                                    const MaybeTensor& segment_offsets,
                                    int64_t capacity,
                                    int64_t num_sms,
                                    double weight_grad_scale,
                                    int64_t slots_per_pass,
                                    bool recompute_gate_up,
                                    const MaybeTensor& tokens_per_expert,
                                    const MaybeTensor& send_rows,
                                    const MaybeTensor& send_weights) {
  check_counter(tokens_per_expert, counts);
  const bool is_trained = gate_up.requires_grad() || down.requires_grad();
  const bool has_backward =
      at::GradMode::is_enabled() && (x.requires_grad() || weights.requires_grad() || is_trained);
  const bool needs_rows = is_trained || recompute_gate_up || slots_per_pass > 0;
  return ChunkedExperts::apply(
      x,
      weights,
      gate_up,
      down,
      ChunkPlan{slot_of_copy,
                counts,
                host_counts,
                top_k,
                row_alignment,
                group_name,
                segment_offsets.value_or(at::Tensor()),
                capacity,
                num_sms},
      Options{weight_grad_scale, slots_per_pass, recompute_gate_up},
      Keeps{has_backward && needs_rows, has_backward && !recompute_gate_up},
      ChunkRows{send_rows.value_or(at::Tensor()), send_weights.value_or(at::Tensor())},
      tokens_per_expert);
}

// Where the Autograd key is off (inference mode) nothing is kept, and the arguments without a name,
// which are about backward, say nothing.
at::Tensor chunked_experts_inference(const at::Tensor& x,
                                     const at::Tensor& weights,
                                     const at::Tensor& slot_of_copy,
                                     const at::Tensor& counts,
                                     const at::Tensor& host_counts,
                                     const at::Tensor& gate_up,
                                     const at::Tensor& down,
                                     int64_t top_k,
                                     int64_t row_alignment,
                                     const std::string& group_name,
                                     const MaybeTensor& segment_offsets,
                                     int64_t capacity,
                                     int64_t num_sms,
                                     double /*weight_grad_scale*/,
                                     int64_t slots_per_pass,
                                     bool /*recompute_gate_up*/,
                                     const MaybeTensor& /*tokens_per_expert*/,
                                     const MaybeTensor& send_rows,
                                     const MaybeTensor& send_weights) {
  return std::get<0>(call_forward(x,
                                  weights,
                                  {slot_of_copy,
                                   counts,
                                   host_counts,
                                   top_k,
                                   row_alignment,
                                   group_name,
                                   segment_offsets.value_or(at::Tensor()),
                                   capacity,
                                   num_sms},
                                  gate_up,
                                  down,
                                  slots_per_pass,
                                  send_rows,
                                  send_weights,
                                  /*keep_rows=*/false,
                                  /*keep_gate_up=*/false));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) {
  m.impl("chunked_experts", &chunked_experts_autograd);
  // Double backward raises instead of treating the gradients as constants.
  m.impl("chunked_experts_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CompositeExplicitAutograd, m) {
  m.impl("chunked_experts", &chunked_experts_inference);
}

}  // namespace torch_moe_ep
