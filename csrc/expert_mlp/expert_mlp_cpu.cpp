#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/element_type_of.h"
#include "common/fresh_pages.h"
#include "expert_mlp/compute.h"
#include "expert_mlp/expert_mlp.h"
#include "expert_mlp/mlp_operators.h"
#include "expert_mlp/panel_gemm.h"
#include "expert_mlp/swiglu_loops.h"

namespace torch_moe_ep {
namespace {

// Consecutive slots of one expert that are computed together: its whole segment, or what a pass
// cuts from it. Those of one expert follow each other.
struct Segment {
  int64_t expert;
  int64_t first;
  int64_t count;
  bool is_experts_first;
  bool is_experts_last;

  at::Tensor of(const at::Tensor& slots) const { return slots.narrow(0, first, count); }
};

bool is_in_passes(int64_t num_slots, int64_t slots_per_pass) {
  return slots_per_pass > 0 && slots_per_pass < num_slots;
}

void check_offsets(const at::Tensor& dense_offsets, int64_t num_slots) {
  const int64_t* offsets = dense_offsets.const_data_ptr<int64_t>();
  const int64_t* last = offsets + dense_offsets.numel() - 1;
  TORCH_CHECK_VALUE(offsets[0] == 0 && std::is_sorted(offsets, last + 1) && *last <= num_slots,
                    "expert_offsets must ascend from 0 to at most the ",
                    num_slots,
                    " rows, got ",
                    c10::IntArrayRef(offsets, dense_offsets.numel()),
                    " (pass the offsets of the plan that made rows)");
}

// Passes end at multiples of slots_per_pass. With offsets 0 5 9 and 4 slots a pass: slots 0 to 3
// and 4 of expert 0, then 5 to 7 and 8 of expert 1. Experts without slots have no segment.
std::vector<Segment> segments_of(const ExpertSegments& experts,
                                 int64_t num_slots,
                                 int64_t slots_per_pass) {
  check_offsets(experts.offsets, num_slots);
  const RowSegments rows = experts.between(experts.offsets.const_data_ptr<int64_t>());
  const int64_t step =
      is_in_passes(num_slots, slots_per_pass) ? slots_per_pass : std::max<int64_t>(num_slots, 1);
  std::vector<Segment> segments;
  for (int64_t l = 0; l < experts.num_experts(); ++l) {
    const int64_t begin = rows.begin(l), end = rows.end(l);
    for (int64_t first = begin, last = 0; first < end; first = last) {
      last = std::min(end, (first / step + 1) * step);
      segments.push_back({l, first, last - first, first == begin, last == end});
    }
  }
  return segments;
}

int64_t longest(const std::vector<Segment>& segments) {
  int64_t count = 0;
  for (const Segment& segment : segments) count = std::max(count, segment.count);
  return count;
}

// Rows that one thread takes at least, so that waking it pays.
int64_t rows_per_task(int64_t width) {
  constexpr int64_t kElements = 16384;
  return std::max<int64_t>(1, kElements / std::max<int64_t>(width, 1));
}

SwigluRows swiglu_arguments(const at::Tensor& z,
                            const at::Tensor& row_weights,
                            const at::Tensor& activation) {
  return {element_type_of(z),
          activation.size(1),
          z.const_data_ptr(),
          row_weights.const_data_ptr<float>(),
          activation.mutable_data_ptr()};
}

void swiglu(const at::Tensor& z, const at::Tensor& row_weights, const at::Tensor& activation) {
  const SwigluRows rows = swiglu_arguments(z, row_weights, activation);
  at::parallel_for(0, z.size(0), rows_per_task(rows.width), [&rows](int64_t first, int64_t last) {
    swiglu_rows(rows, first, last);
  });
}

// Turns the activation's gradient into the activation, in place, and writes grad_z (which may be z)
// and grad_row_weights.
void swiglu_backward(const at::Tensor& z,
                     const at::Tensor& row_weights,
                     const at::Tensor& activation,
                     const at::Tensor& grad_z,
                     const at::Tensor& grad_row_weights) {
  const SwigluGradientRows rows = {swiglu_arguments(z, row_weights, activation),
                                   activation.const_data_ptr(),
                                   grad_z.mutable_data_ptr(),
                                   grad_row_weights.mutable_data_ptr<float>()};
  const int64_t grain = rows_per_task(rows.forward.width);
  at::parallel_for(0, z.size(0), grain, [&rows](int64_t first, int64_t last) {
    swiglu_gradient_rows(rows, first, last);
  });
}

// The gradient of one weight [L, M, N]: scale * sum over an expert's slots of left^T right.
class WeightGradient {
 public:
  WeightGradient(at::IntArrayRef sizes, const at::TensorOptions& options, double scale)
      : scale_(scale), gradient_(at::empty(sizes, options)) {}

  // Segments come in their order; left [count, M], right [count, N].
  void add(const Segment& segment, const at::Tensor& left, const at::Tensor& right) {
    zero_until(segment.expert);
    num_written_ = segment.expert + 1;
    const at::Tensor out = gradient_.select(0, segment.expert);
    const bool is_whole = segment.is_experts_first && segment.is_experts_last;
    if (is_whole || out.scalar_type() == at::kFloat) {
      product(out, left, right, segment.is_experts_first);
    } else {
      add_in_fp32(segment, left, right, out);
    }
  }

  at::Tensor finish() {
    zero_until(gradient_.size(0));
    return gradient_;
  }

 private:
  // out = scale * left^T right, or added to out where this is not an expert's first part.
  void product(const at::Tensor& out,
               const at::Tensor& left,
               const at::Tensor& right,
               bool is_first) const {
    if (is_first) take_fresh_pages(out);
    multiply(out, left.t(), right, scale_, is_first ? 0.0 : 1.0, Destination::kReadLater);
  }

  // Several parts of a 16-bit gradient: fp32 for one expert at a time, since its parts follow each
  // other, rounded once when the last has come.
  void add_in_fp32(const Segment& segment,
                   const at::Tensor& left,
                   const at::Tensor& right,
                   const at::Tensor& out) {
    if (!sum_.defined()) {
      part_ = at::empty(out.sizes(), out.options());
      sum_ = at::empty(out.sizes(), out.options().dtype(at::kFloat));
    }
    product(part_, left, right, /*is_first=*/true);
    if (segment.is_experts_first) {
      sum_.copy_(part_);
    } else {
      sum_.add_(part_);
    }
    if (segment.is_experts_last) out.copy_(sum_);
  }

  void zero_until(int64_t expert) {
    for (; num_written_ < expert; ++num_written_) gradient_.select(0, num_written_).zero_();
  }

  double scale_;
  at::Tensor gradient_;
  at::Tensor part_;          // [M, N] in the weight's dtype
  at::Tensor sum_;           // [M, N] fp32
  int64_t num_written_ = 0;  // experts that have their gradient, or its first parts
};

// Buffers hold one segment and serve every expert in turn: they stay in the cache, and few pages
// are touched for the first time. The GEMMs write into given tensors, which autograd refuses for
// weights that need gradients: all below it.

MlpOutputs forward(const ExpertSegments& experts,
                   const MlpInputs& in,
                   int64_t slots_per_pass,
                   bool keeps_z,
                   MlpOutputs into) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t num_slots = in.rows.size(0);
  const auto segments = segments_of(experts, num_slots, slots_per_pass);
  const auto options = in.rows.options();
  const bool has_z = keeps_z && !is_in_passes(num_slots, slots_per_pass);
  if (!into.y.defined()) into.y = at::empty_like(in.rows);
  if (has_z && !into.z.defined()) into.z = at::empty({num_slots, in.gate_up.size(1)}, options);
  const int64_t num_buffered = longest(segments);
  const at::Tensor z_buffer = at::empty({has_z ? 0 : num_buffered, in.gate_up.size(1)}, options);
  const at::Tensor buffer = at::empty({num_buffered, in.down.size(2)}, options);
  for (const Segment& segment : segments) {
    const at::Tensor z = has_z ? segment.of(into.z) : z_buffer.narrow(0, 0, segment.count);
    const at::Tensor activation = buffer.narrow(0, 0, segment.count);
    if (has_z) take_fresh_pages(z);
    multiply(z, segment.of(in.rows), in.gate_up.select(0, segment.expert).t());
    swiglu(z, segment.of(in.row_weights), activation);
    multiply(segment.of(into.y), activation, in.down.select(0, segment.expert).t());
  }
  return into;
}

// Of one segment, into tensors of its rows. z: of these rows, or undefined to compute it again into
// its gradient's place.
void segment_input_grads(const Segment& segment,
                         const at::Tensor& grad_y,
                         const MlpInputs& in,
                         const at::Tensor& z,
                         const MlpInputGradients& into) {
  const at::Tensor gate_up = in.gate_up.select(0, segment.expert);
  if (!z.defined()) multiply(into.z, segment.of(in.rows), gate_up.t());
  // First its gradient.
  multiply(into.activation, segment.of(grad_y), in.down.select(0, segment.expert));
  swiglu_backward(z.defined() ? segment.of(z) : into.z,
                  segment.of(in.row_weights),
                  into.activation,
                  into.z,
                  into.row_weights);
  multiply(into.rows, into.z, gate_up);
}

MlpInputGradients input_grads(const ExpertSegments& experts,
                              const at::Tensor& grad_y,
                              const MlpInputs& in,
                              const at::Tensor& z,
                              MlpInputGradients into) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  for (const Segment& segment : segments_of(experts, grad_y.size(0), 0)) {
    segment_input_grads(segment,
                        grad_y,
                        in,
                        z,
                        {segment.of(into.rows),
                         segment.of(into.row_weights),
                         segment.of(into.z),
                         segment.of(into.activation)});
  }
  return into;
}

MlpGradients weight_grads(const ExpertSegments& experts,
                          const at::Tensor& grad_y,
                          const at::Tensor& rows,
                          const at::Tensor& grad_z,
                          const at::Tensor& activation,
                          double weight_grad_scale) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t num_experts = experts.num_experts();
  const int64_t hidden = rows.size(1), width = activation.size(1);
  const auto options = rows.options();
  WeightGradient gate_up({num_experts, 2 * width, hidden}, options, weight_grad_scale);
  WeightGradient down({num_experts, hidden, width}, options, weight_grad_scale);
  for (const Segment& segment : segments_of(experts, rows.size(0), 0)) {
    down.add(segment, segment.of(grad_y), segment.of(activation));
    gate_up.add(segment, segment.of(grad_z), segment.of(rows));
  }
  return {{}, {}, gate_up.finish(), down.finish()};
}

MlpGradients backward(const ExpertSegments& experts,
                      const at::Tensor& grad_y,
                      const MlpInputs& in,
                      const at::Tensor& z,
                      double weight_grad_scale,
                      int64_t slots_per_pass,
                      bool needs_weight_grads,
                      MlpGradients into) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto options = in.rows.options();
  const auto segments = segments_of(experts, in.rows.size(0), slots_per_pass);
  const int64_t num_buffered = longest(segments);
  const at::Tensor buffer = at::empty({num_buffered, in.down.size(2)}, options);
  const at::Tensor z_buffer = at::empty({num_buffered, in.gate_up.size(1)}, options);
  if (!into.rows.defined()) into.rows = at::empty_like(in.rows);
  if (!into.row_weights.defined()) into.row_weights = at::empty_like(in.row_weights);
  std::optional<WeightGradient> gate_up, down;
  if (needs_weight_grads) {
    gate_up.emplace(in.gate_up.sizes(), options, weight_grad_scale);
    down.emplace(in.down.sizes(), options, weight_grad_scale);
  }
  for (const Segment& segment : segments) {
    const MlpInputGradients found = {segment.of(into.rows),
                                     segment.of(into.row_weights),
                                     z_buffer.narrow(0, 0, segment.count),
                                     buffer.narrow(0, 0, segment.count)};
    const bool has_z = z.size(0) == in.rows.size(0);
    segment_input_grads(segment, grad_y, in, has_z ? z : at::Tensor(), found);
    if (!needs_weight_grads) continue;
    down->add(segment, segment.of(grad_y), found.activation);
    gate_up->add(segment, found.z, segment.of(in.rows));
  }
  if (!needs_weight_grads) return {into.rows, into.row_weights, {}, {}};
  if (!into.gate_up.defined()) {
    return {into.rows, into.row_weights, gate_up->finish(), down->finish()};
  }
  into.gate_up.add_(gate_up->finish());
  into.down.add_(down->finish());
  return {into.rows, into.row_weights, {}, {}};
}

}  // namespace

const MlpCompute kComputeCpu = {&forward, &input_grads, &weight_grads, &backward};

TORCH_LIBRARY_IMPL(torch_moe_ep, CPU, m) { implement_operators<kComputeCpu>(m); }

}  // namespace torch_moe_ep
