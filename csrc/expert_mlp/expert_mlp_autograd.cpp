#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "common/call_operator.h"
#include "common/unowned_rows.h"
#include "movement/movement.h"

namespace torch_moe_ep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Two = std::tuple<at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Where backward adds the weights' gradients, or undefined tensors.
struct MainGrads {
  at::Tensor gate_up;
  at::Tensor down;
};

MainGrads main_grads_of(const std::optional<at::Tensor>& gate_up,
                        const std::optional<at::Tensor>& down) {
  TORCH_CHECK_VALUE(gate_up.has_value() == down.has_value(),
                    "main_grad_gate_up and main_grad_down come together, got one of them");
  return {gate_up.value_or(at::Tensor()), down.value_or(at::Tensor())};
}

// Where rows came from at P = 1, so that backward can dispatch them again: K copies of X are as
// large as K X. x is undefined where rows are kept.
struct RowsSource {
  at::Tensor x;
  at::Tensor slot_of_copy;
  at::Tensor counts;
  int64_t top_k;
  int64_t row_alignment;
};

RowsSource rows_source(const at::Tensor& rows,
                       const std::optional<at::Tensor>& x,
                       const std::optional<at::Tensor>& slot_of_copy,
                       const std::optional<at::Tensor>& counts,
                       int64_t top_k,
                       int64_t row_alignment) {
  if (!x.has_value()) return {at::Tensor(), at::Tensor(), at::Tensor(), top_k, row_alignment};
  TORCH_CHECK_VALUE(slot_of_copy.has_value() && counts.has_value(),
                    "x comes with the plan's slot_of_copy and counts, got x alone");
  TORCH_CHECK_VALUE(x->scalar_type() == rows.scalar_type(),
                    "x must have rows' dtype ",
                    rows.scalar_type(),
                    ", got ",
                    x->scalar_type(),
                    " (pass what dispatch was called with, or no x)");
  return {*x, *slot_of_copy, *counts, top_k, row_alignment};
}

at::Tensor dispatch_again(const RowsSource& source, const at::Tensor& expert_offsets) {
  // backward() inside an autocast region must not cast what forward did not.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor no_received = source.slot_of_copy.slice(0, 0, 0);
  const at::Tensor no_host_counts =
      at::empty_symint({0, source.counts.sym_size(1)}, at::TensorOptions().dtype(at::kLong));
  const Movement movement = {{source.slot_of_copy,
                              no_received,
                              expert_offsets,
                              source.counts,
                              no_host_counts,
                              source.top_k,
                              source.row_alignment,
                              ""}};
  return std::get<0>(movement.dispatch(source.x, std::nullopt));
}

class ExpertMlp : public torch::autograd::Function<ExpertMlp> {
 public:
  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& rows,
                            const at::Tensor& row_weights,
                            const at::Tensor& expert_offsets,
                            const at::Tensor& host_offsets,
                            const at::Tensor& gate_up,
                            const at::Tensor& down,
                            double weight_grad_scale,
                            int64_t slots_per_pass,
                            bool recompute_gate_up,
                            const RowsSource& source,
                            const MainGrads& main_grads) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, z] = call_operator<"expert_mlp_forward", Two>(
        rows, row_weights, expert_offsets, host_offsets, gate_up, down, slots_per_pass);
    // A narrowed z would keep all of it alive.
    if (recompute_gate_up) z = at::empty_symint({0, gate_up.sym_size(1)}, rows.options());
    // Of rows are made z, and the gradients of weights that are trained.
    const bool is_trained =
        gate_up.requires_grad() || down.requires_grad() || main_grads.gate_up.defined();
    const bool needs_rows = is_trained || recompute_gate_up || slots_per_pass > 0;
    const bool keeps_x = needs_rows && source.x.defined();
    ctx->save_for_backward({needs_rows && !keeps_x ? rows : at::Tensor(),
                            row_weights,
                            z,
                            expert_offsets,
                            host_offsets,
                            gate_up,
                            down,
                            keeps_x ? source.x : at::Tensor(),
                            source.slot_of_copy,
                            source.counts});
    // Not saved for backward: other calls' backward adds to them in between.
    ctx->saved_data["main_grad_gate_up"] = main_grads.gate_up;
    ctx->saved_data["main_grad_down"] = main_grads.down;
    ctx->saved_data["top_k"] = source.top_k;
    ctx->saved_data["row_alignment"] = source.row_alignment;
    ctx->saved_data["weight_grad_scale"] = weight_grad_scale;
    ctx->saved_data["slots_per_pass"] = slots_per_pass;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const RowsSource source = {saved[7],
                               saved[8],
                               saved[9],
                               ctx->saved_data["top_k"].toInt(),
                               ctx->saved_data["row_alignment"].toInt()};
    at::Tensor rows = source.x.defined() ? dispatch_again(source, saved[3]) : saved[0];
    if (!rows.defined()) rows = grad_outputs[0];  // of the same shape, and nobody reads them
    const auto call = [&]<OperatorName kName, typename Result>(const auto&... more) {
      return call_operator<kName, Result>(grad_outputs[0],
                                          rows,
                                          saved[1],
                                          saved[2],
                                          saved[3],
                                          saved[4],
                                          saved[5],
                                          saved[6],
                                          ctx->saved_data["weight_grad_scale"].toDouble(),
                                          ctx->saved_data["slots_per_pass"].toInt(),
                                          more...);
    };
    // Of the tensors among forward's arguments gate_up is the fifth, down the sixth. Without rows
    // neither was trained.
    const bool needs_weight_grads = ctx->needs_input_grad(4) || ctx->needs_input_grad(5);
    at::Tensor grad_rows, grad_row_weights, grad_gate_up, grad_down;
    const at::Tensor main_gate_up = ctx->saved_data["main_grad_gate_up"].toTensor();
    const at::Tensor main_down = ctx->saved_data["main_grad_down"].toTensor();
    if (main_gate_up.defined()) {
      std::tie(grad_rows, grad_row_weights) =
          call.operator()<"expert_mlp_backward_add", Two>(main_gate_up, main_down);
    } else {
      std::tie(grad_rows, grad_row_weights, grad_gate_up, grad_down) =
          call.operator()<"expert_mlp_backward", Four>(needs_weight_grads);
    }
    if (!needs_weight_grads) grad_gate_up = grad_down = at::Tensor();
    const at::Tensor none;
    return {without_unowned(grad_rows, saved[3]),
            without_unowned(grad_row_weights, saved[3]),
            none,  // expert_offsets
            none,  // host_offsets
            grad_gate_up,
            grad_down,
            none,   // weight_grad_scale
            none,   // slots_per_pass
            none,   // recompute_gate_up
            none,   // source
            none};  // main_grads
  }
};

at::Tensor expert_mlp_autograd(const at::Tensor& rows,
                               const at::Tensor& row_weights,
                               const at::Tensor& expert_offsets,
                               const at::Tensor& host_offsets,
                               const at::Tensor& gate_up,
                               const at::Tensor& down,
                               double weight_grad_scale,
                               int64_t slots_per_pass,
                               bool recompute_gate_up,
                               const std::optional<at::Tensor>& x,
                               const std::optional<at::Tensor>& slot_of_copy,
                               const std::optional<at::Tensor>& counts,
                               int64_t top_k,
                               int64_t row_alignment,
                               const std::optional<at::Tensor>& main_grad_gate_up,
                               const std::optional<at::Tensor>& main_grad_down) {
  return ExpertMlp::apply(rows,
                          row_weights,
                          expert_offsets,
                          host_offsets,
                          gate_up,
                          down,
                          weight_grad_scale,
                          slots_per_pass,
                          recompute_gate_up,
                          rows_source(rows, x, slot_of_copy, counts, top_k, row_alignment),
                          main_grads_of(main_grad_gate_up, main_grad_down));
}

// Where the Autograd key is off (inference mode) nothing is kept, and the arguments without a name,
// which are about backward, say nothing.
at::Tensor expert_mlp_inference(const at::Tensor& rows,
                                const at::Tensor& row_weights,
                                const at::Tensor& expert_offsets,
                                const at::Tensor& host_offsets,
                                const at::Tensor& gate_up,
                                const at::Tensor& down,
                                double /*weight_grad_scale*/,
                                int64_t slots_per_pass,
                                bool /*recompute_gate_up*/,
                                const std::optional<at::Tensor>& /*x*/,
                                const std::optional<at::Tensor>& /*slot_of_copy*/,
                                const std::optional<at::Tensor>& /*counts*/,
                                int64_t /*top_k*/,
                                int64_t /*row_alignment*/,
                                const std::optional<at::Tensor>& /*main_grad_gate_up*/,
                                const std::optional<at::Tensor>& /*main_grad_down*/) {
  return std::get<0>(call_operator<"expert_mlp_forward", Two>(
      rows, row_weights, expert_offsets, host_offsets, gate_up, down, slots_per_pass));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, Autograd, m) {
  m.impl("expert_mlp", &expert_mlp_autograd);
  // Double backward raises instead of treating the gradients as constants.
  m.impl("expert_mlp_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("expert_mlp_backward_add", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CompositeExplicitAutograd, m) {
  m.impl("expert_mlp", &expert_mlp_inference);
}

}  // namespace torch_moe_ep
