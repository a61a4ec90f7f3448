#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "expert_mlp/compute.h"
#include "expert_mlp/expert_gemms.h"
#include "expert_mlp/expert_mlp.h"
#include "expert_mlp/mlp_operators.h"

namespace torch_moe_ep {
namespace {

// One run of consecutive slots with the experts' segments cut to it.
struct Pass {
  int64_t first;
  int64_t count;
  ExpertSegments segments;  // relative to `first`

  at::Tensor of(const at::Tensor& tensor) const { return tensor.narrow(0, first, count); }
};

// slots_per_pass 0 means one pass.
bool is_one_pass(int64_t num_slots, int64_t slots_per_pass) {
  return slots_per_pass <= 0 || slots_per_pass >= num_slots;
}

ExpertSegments cut(const ExpertSegments& segments, int64_t first, int64_t count) {
  const auto cut_offsets = [first, count](const at::Tensor& offsets) {
    return offsets.sub(first).clamp_(0, count);
  };
  ExpertSegments found = segments;
  found.offsets = cut_offsets(segments.offsets);
  if (segments.is_known_to_host()) found.host_offsets = cut_offsets(segments.host_offsets);
  return found;
}

// Of a chunk, runs of slots that hold only other chunks' rows are left out where the host knows.
bool may_have_rows(const ExpertSegments& segments) {
  if (segments.has_all_rows() || !segments.is_known_to_host()) return true;
  const RowSegments host = segments.between(segments.host_offsets.const_data_ptr<int64_t>());
  for (int64_t l = 0; l < segments.num_experts(); ++l) {
    if (host.begin(l) < host.end(l)) return true;
  }
  return false;
}

// Cuts fall on multiples of kRowAlignment, as the GEMMs need; the offsets are cut on the device, so
// that passes cost no host sync.
std::vector<Pass> passes_of(int64_t num_slots,
                            int64_t slots_per_pass,
                            const ExpertSegments& segments) {
  if (is_one_pass(num_slots, slots_per_pass)) return {{0, num_slots, segments}};
  const int64_t step = (slots_per_pass + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  std::vector<Pass> passes;
  for (int64_t first = 0; first < num_slots; first += step) {
    const int64_t count = std::min(step, num_slots - first);
    Pass pass = {first, count, cut(segments, first, count)};
    if (may_have_rows(pass.segments)) passes.push_back(std::move(pass));
  }
  return passes;
}

// A weight gradient over the passes: one pass keeps its tensor, several are summed in fp32 and
// rounded once; with a main_grad all are added there.
class WeightGradient {
 public:
  explicit WeightGradient(at::Tensor main_grad) : main_grad_(std::move(main_grad)) {}

  void add(ExpertGemms& gemms, const at::Tensor& rows_a, const at::Tensor& rows_b, double scale) {
    if (main_grad_.defined()) {
      gemms.tn_add(rows_a, rows_b, scale, main_grad_);
      return;
    }
    at::Tensor part = gemms.tn(rows_a, rows_b, scale);
    if (!sum_.defined()) {
      sum_ = std::move(part);
      return;
    }
    if (sum_.scalar_type() != at::kFloat) sum_ = sum_.to(at::kFloat);
    sum_.add_(part);
  }
  // Undefined with a main_grad.
  at::Tensor get(at::ScalarType dtype) const { return sum_.defined() ? sum_.to(dtype) : sum_; }

 private:
  at::Tensor main_grad_;
  at::Tensor sum_;
};

MlpOutputs forward(const ExpertSegments& segments,
                   const MlpInputs& in,
                   int64_t slots_per_pass,
                   bool keeps_z,
                   MlpOutputs into) {
  const c10::cuda::CUDAGuard guard(in.rows.device());
  const int64_t num_slots = in.rows.size(0);
  if (is_one_pass(num_slots, slots_per_pass)) {
    ExpertGemms gemms(segments);
    const auto hidden =
        gemms.nt_swiglu(in.rows, in.gate_up, in.row_weights, {into.z, at::Tensor()});
    const at::Tensor y = gemms.nt(hidden.activation, in.down, into.y);
    return {y, keeps_z ? hidden.z : at::Tensor()};
  }
  if (!into.y.defined()) into.y = at::empty_like(in.rows);
  for (const Pass& pass : passes_of(num_slots, slots_per_pass, segments)) {
    ExpertGemms gemms(pass.segments);
    const auto hidden = gemms.nt_swiglu(pass.of(in.rows), in.gate_up, pass.of(in.row_weights));
    gemms.nt(hidden.activation, in.down, pass.of(into.y));
  }
  return {into.y, at::Tensor()};
}

// z: undefined to compute it again from the rows.
MlpInputGradients input_grads_by(ExpertGemms& gemms,
                                 const at::Tensor& grad_y,
                                 const MlpInputs& in,
                                 const at::Tensor& z,
                                 MlpInputGradients into) {
  if (!into.row_weights.defined()) into.row_weights = at::empty_like(in.row_weights);
  const auto hidden = gemms.nn_swiglu_backward(grad_y,
                                               in.down,
                                               z.defined() ? z : gemms.nt(in.rows, in.gate_up),
                                               in.row_weights,
                                               into.row_weights,
                                               {into.activation, into.z});
  const at::Tensor rows = gemms.nn(hidden.grad_z, in.gate_up, into.rows);
  return {rows, into.row_weights, hidden.grad_z, hidden.activation};
}

MlpInputGradients input_grads(const ExpertSegments& segments,
                              const at::Tensor& grad_y,
                              const MlpInputs& in,
                              const at::Tensor& z,
                              MlpInputGradients into) {
  const c10::cuda::CUDAGuard guard(grad_y.device());
  ExpertGemms gemms(segments);
  return input_grads_by(gemms, grad_y, in, z, std::move(into));
}

MlpGradients weight_grads(const ExpertSegments& segments,
                          const at::Tensor& grad_y,
                          const at::Tensor& rows,
                          const at::Tensor& grad_z,
                          const at::Tensor& activation,
                          double weight_grad_scale) {
  const c10::cuda::CUDAGuard guard(rows.device());
  ExpertGemms gemms(segments);
  const at::Tensor down = gemms.tn(grad_y, activation, weight_grad_scale);
  const at::Tensor gate_up = gemms.tn(grad_z, rows, weight_grad_scale);
  return {{}, {}, gate_up, down};
}

MlpGradients backward(const ExpertSegments& segments,
                      const at::Tensor& grad_y,
                      const MlpInputs& in,
                      const at::Tensor& z,
                      double weight_grad_scale,
                      int64_t slots_per_pass,
                      bool needs_weight_grads,
                      MlpGradients into) {
  const c10::cuda::CUDAGuard guard(in.rows.device());
  const int64_t num_slots = in.rows.size(0);
  const bool is_one = is_one_pass(num_slots, slots_per_pass);
  if (!into.row_weights.defined()) into.row_weights = at::empty_like(in.row_weights);
  if (!into.rows.defined() && !is_one) into.rows = at::empty_like(in.rows);
  WeightGradient grad_gate_up(into.gate_up), grad_down(into.down);
  for (const Pass& pass : passes_of(num_slots, slots_per_pass, segments)) {
    const at::Tensor grad = pass.of(grad_y);
    const MlpInputs inputs = {pass.of(in.rows), pass.of(in.row_weights), in.gate_up, in.down};
    const at::Tensor rows_into = into.rows.defined() ? pass.of(into.rows) : at::Tensor();
    ExpertGemms gemms(pass.segments);
    const MlpInputGradients found =
        input_grads_by(gemms,
                       grad,
                       inputs,
                       is_one && z.size(0) == num_slots ? z : at::Tensor(),
                       {rows_into, pass.of(into.row_weights), {}, {}});
    if (is_one) into.rows = found.rows;
    if (!needs_weight_grads) continue;
    grad_down.add(gemms, grad, found.activation, weight_grad_scale);
    grad_gate_up.add(gemms, found.z, inputs.rows, weight_grad_scale);
  }
  into.gate_up = grad_gate_up.get(in.gate_up.scalar_type());
  into.down = grad_down.get(in.down.scalar_type());
  return into;
}

}  // namespace

const MlpCompute kComputeCuda = {&forward, &input_grads, &weight_grads, &backward};

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) { implement_operators<kComputeCuda>(m); }

}  // namespace torch_moe_ep
