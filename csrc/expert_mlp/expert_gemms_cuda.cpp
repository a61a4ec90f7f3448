#include "expert_mlp/expert_gemms.h"

#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <optional>
#include <utility>

#include "common/element_type_of.h"
#include "expert_mlp/swiglu_kernels.h"

namespace torch_moe_ep {
namespace {

constexpr uintptr_t kPointerAlignment = 16;

bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kPointerAlignment == 0;
}

// What is undefined is made.
void make_where_undefined(at::Tensor& tensor, at::IntArrayRef sizes, const at::Tensor& like) {
  if (!tensor.defined()) tensor = at::empty(sizes, like.options());
}

bool is_hand_written(GemmKernels kernels) {
  return kernels == GemmKernels::kSm90 || kernels == GemmKernels::kSm80;
}

GemmKernels choose(const GroupedGemmShape& shape,
                   std::initializer_list<std::reference_wrapper<const at::Tensor>> operands) {
  const at::Tensor& a = *operands.begin();
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  const GemmRequest request = {shape,
                               a.scalar_type() == at::kBFloat16,
                               std::all_of(operands.begin(), operands.end(), is_aligned),
                               device->major * 10 + device->minor};
  const GemmChoice choice = choose_gemm(request, kernel_wish());
  TORCH_CHECK(choice.refusal == nullptr,
              "TORCH_MOE_EP_KERNELS asks for kernels that cannot run: ",
              choice.refusal,
              " (unset it, or set it to auto)");
  return choice.kernels;
}

}  // namespace

ExpertGemms::ExpertGemms(ExpertSegments segments) : segments_(std::move(segments)) {}

void ExpertGemms::launch(GemmKernels kernels, GroupedGemmParams params) {
  constexpr int64_t kCountersAtOnce = 4;  // GEMMs of a backward
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  if (kernels == GemmKernels::kSm80) {
    params.max_shared_bytes = max_shared_bytes_;
    C10_CUDA_CHECK(sm80::grouped_gemm(params, stream));
    return;
  }
  if (!tile_counters_.defined() || num_used_counters_ == tile_counters_.numel()) {
    tile_counters_ = at::empty({kCountersAtOnce}, segments_.offsets.options().dtype(at::kInt));
    C10_CUDA_CHECK(
        cudaMemsetAsync(tile_counters_.mutable_data_ptr(), 0, tile_counters_.nbytes(), stream));
    num_used_counters_ = 0;
  }
  params.next_tile = tile_counters_.mutable_data_ptr<int>() + num_used_counters_++;
  C10_CUDA_CHECK(sm90::grouped_gemm(params, stream));
}

RowSegments ExpertGemms::on_device() const {
  return segments_.between(segments_.offsets.const_data_ptr<int64_t>());
}

RowSegments ExpertGemms::on_host() {
  // Host sync when only the device knows the offsets.
  if (!segments_.is_known_to_host()) segments_.host_offsets = segments_.offsets.cpu();
  return segments_.between(segments_.host_offsets.const_data_ptr<int64_t>());
}

const at::Tensor& ExpertGemms::segment_ends() {
  TORCH_INTERNAL_ASSERT(segments_.has_all_rows());
  if (!segment_ends_.defined()) {
    segment_ends_ =
        segments_.offsets.slice(0, segments_.stride, std::nullopt, segments_.stride).to(at::kInt);
  }
  return segment_ends_;
}

GroupedGemmShape ExpertGemms::shape_of(GemmLayout layout,
                                       const at::Tensor& a,
                                       const at::Tensor& b) const {
  GroupedGemmShape shape = {layout, segments_.num_experts(), a.size(0), b.size(-1), a.size(1)};
  if (layout == GemmLayout::kNT) shape.columns = b.size(1);
  shape.num_parts = segments_.stride / segments_.span;
  return shape;
}

GroupedGemmParams ExpertGemms::params_of(const GroupedGemmShape& shape,
                                         const at::Tensor& a,
                                         const at::Tensor& b,
                                         const at::Tensor& out) const {
  GroupedGemmParams params = {};
  params.shape = shape;
  params.a = a.const_data_ptr();
  params.b = b.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.segments = on_device();
  return params;
}

at::Tensor ExpertGemms::nt(const at::Tensor& rows,
                           const at::Tensor& weights,
                           const at::Tensor& into) {
  return rows_times_weights(GemmLayout::kNT, rows, weights, into);
}

at::Tensor ExpertGemms::nn(const at::Tensor& rows,
                           const at::Tensor& weights,
                           const at::Tensor& into) {
  return rows_times_weights(GemmLayout::kNN, rows, weights, into);
}

at::Tensor ExpertGemms::rows_times_weights(GemmLayout layout,
                                           const at::Tensor& rows,
                                           const at::Tensor& weights,
                                           at::Tensor out) {
  const GroupedGemmShape shape = shape_of(layout, rows, weights);
  const bool is_given = out.defined();
  const GemmKernels kernels = choose(shape, {rows, weights, is_given ? out : rows});
  const at::Tensor right = layout == GemmLayout::kNT ? weights.transpose(1, 2) : weights;
  if (kernels == GemmKernels::kTorchGrouped && segments_.has_all_rows()) {
    at::Tensor found = at::_grouped_mm(rows, right, segment_ends());
    if (!is_given) return found;
    // It may write rows behind the last segment, which in a given tensor are somebody else's.
    const at::Tensor number = at::arange(shape.rows, segment_ends().options());
    const at::Tensor is_owned = number.lt(segment_ends().slice(0, -1)).unsqueeze(1);
    return out.copy_(at::where(is_owned, found, out));
  }
  make_where_undefined(out, {shape.rows, shape.columns}, rows);
  if (shape.rows == 0) return out;
  if (is_hand_written(kernels)) {
    launch(kernels, params_of(shape, rows, weights, out));
  } else {
    multiply_one_by_one(rows, right, out);
  }
  return out;
}

// One torch matmul an expert.
void ExpertGemms::multiply_one_by_one(const at::Tensor& rows,
                                      const at::Tensor& right,
                                      const at::Tensor& out) {
  const RowSegments segments = on_host();
  for (int64_t l = 0; l < segments_.num_experts(); ++l) {
    const int64_t first = segments.begin(l), count = segments.end(l) - first;
    if (count == 0) continue;
    at::Tensor segment = out.narrow(0, first, count);
    at::mm_out(segment, rows.narrow(0, first, count), right.select(0, l));
  }
}

at::Tensor ExpertGemms::tn(const at::Tensor& rows_a, const at::Tensor& rows_b, double alpha) {
  const int64_t num_experts = segments_.num_experts();
  if (rows_a.size(0) == 0) {
    return at::zeros({num_experts, rows_a.size(1), rows_b.size(1)}, rows_a.options());
  }
  const GroupedGemmShape shape = shape_of(GemmLayout::kTN, rows_a, rows_b);
  const GemmKernels kernels = choose(shape, {rows_a, rows_b});
  if (kernels == GemmKernels::kTorchGrouped && segments_.has_all_rows()) {
    at::Tensor out = at::_grouped_mm(rows_a.t(), rows_b, segment_ends());
    return alpha == 1.0 ? out : out.mul_(alpha);
  }
  at::Tensor out = at::empty({num_experts, shape.a_columns, shape.columns}, rows_a.options());
  if (is_hand_written(kernels)) {
    GroupedGemmParams params = params_of(shape, rows_a, rows_b, out);
    params.alpha = static_cast<float>(alpha);
    launch(kernels, params);
    return out;
  }
  const RowSegments segments = on_host();
  for (int64_t l = 0; l < num_experts; ++l) {
    const int64_t first = segments.begin(l), count = segments.end(l) - first;
    at::Tensor gradient = out.select(0, l);
    if (count == 0) {
      gradient.zero_();
      continue;
    }
    // beta 0: what `gradient` holds is not read.
    at::addmm_out(gradient,
                  gradient,
                  rows_a.narrow(0, first, count).t(),
                  rows_b.narrow(0, first, count),
                  0,
                  alpha);
  }
  return out;
}

void ExpertGemms::tn_add(const at::Tensor& rows_a,
                         const at::Tensor& rows_b,
                         double alpha,
                         const at::Tensor& sum) {
  if (rows_a.size(0) == 0) return;
  GroupedGemmShape shape = shape_of(GemmLayout::kTN, rows_a, rows_b);
  if (choose(shape, {rows_a, rows_b}) == GemmKernels::kSm90 && is_aligned(sum)) {
    shape.epilogue = GemmEpilogue::kAccumulate;
    GroupedGemmParams params = params_of(shape, rows_a, rows_b, sum);
    params.alpha = static_cast<float>(alpha);
    launch(GemmKernels::kSm90, params);
    return;
  }
  sum.add_(tn(rows_a, rows_b, alpha));
}

ExpertGemms::GateUp ExpertGemms::nt_swiglu(const at::Tensor& rows,
                                           const at::Tensor& weights,
                                           const at::Tensor& row_weights,
                                           GateUp into) {
  GroupedGemmShape shape = shape_of(GemmLayout::kNT, rows, weights);
  const int64_t width = shape.columns / 2;
  make_where_undefined(into.activation, {shape.rows, width}, rows);
  if (choose(shape, {rows, weights}) == GemmKernels::kSm90) {
    shape.epilogue = GemmEpilogue::kSwiglu;
    make_where_undefined(into.z, {shape.rows, shape.columns}, rows);
    if (sm90::is_supported(shape) && is_aligned(into.z) && is_aligned(into.activation)) {
      GroupedGemmParams params = params_of(shape, rows, weights, into.z);
      params.activation = into.activation.mutable_data_ptr();
      params.row_weights = row_weights.const_data_ptr<float>();
      launch(GemmKernels::kSm90, params);
      return into;
    }
  }
  into.z = nt(rows, weights, into.z);
  SwigluParams params = {};
  params.rows = shape.rows;
  params.width = width;
  params.segments = on_device();
  params.num_experts = static_cast<int>(shape.num_experts);
  params.z = into.z.const_data_ptr();
  params.row_weights = row_weights.const_data_ptr<float>();
  params.activation = into.activation.mutable_data_ptr();
  params.element_type = element_type_of(rows);
  C10_CUDA_CHECK(launch_swiglu(params, at::cuda::getCurrentCUDAStream()));
  return into;
}

ExpertGemms::SwigluGradients ExpertGemms::nn_swiglu_backward(const at::Tensor& grad_rows,
                                                             const at::Tensor& weights,
                                                             const at::Tensor& z,
                                                             const at::Tensor& row_weights,
                                                             const at::Tensor& grad_row_weights,
                                                             SwigluGradients into,
                                                             std::optional<bool> is_fused) {
  GroupedGemmShape shape = shape_of(GemmLayout::kNN, grad_rows, weights);
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const auto num_experts = static_cast<int>(shape.num_experts);
  make_where_undefined(into.activation, {shape.rows, shape.columns}, z);
  make_where_undefined(into.grad_z, z.sizes(), z);
  const bool has_fused =
      choose(shape, {grad_rows, weights, z, into.activation, into.grad_z}) == GemmKernels::kSm90;
  TORCH_CHECK(has_fused || !is_fused.value_or(false),
              "SwiGLU's gradient in the GEMM's epilogue needs the sm90 kernels");
  if (has_fused && is_fused.value_or(sm90::fuses_swiglu_backward(shape))) {
    shape.epilogue = GemmEpilogue::kSwigluBackward;
    const int64_t num_tiles = sm90::num_column_tiles(shape);
    const at::Tensor partial_dots = at::empty({num_tiles, shape.rows}, row_weights.options());
    GroupedGemmParams params = params_of(shape, grad_rows, weights, into.grad_z);
    params.activation = into.activation.mutable_data_ptr();
    params.row_weights = row_weights.const_data_ptr<float>();
    params.z = z.const_data_ptr();
    params.partial_dots = partial_dots.mutable_data_ptr<float>();
    launch(GemmKernels::kSm90, params);
    C10_CUDA_CHECK(launch_add_up({shape.rows,
                                  on_device(),
                                  num_experts,
                                  num_tiles,
                                  partial_dots.const_data_ptr<float>(),
                                  grad_row_weights.mutable_data_ptr<float>()},
                                 stream));
    return into;
  }
  const at::Tensor grad_activation = nn(grad_rows, weights);
  SwigluBackwardParams params = {};
  params.forward.rows = shape.rows;
  params.forward.width = shape.columns;
  params.forward.segments = on_device();
  params.forward.num_experts = num_experts;
  params.forward.z = z.const_data_ptr();
  params.forward.row_weights = row_weights.const_data_ptr<float>();
  params.forward.activation = into.activation.mutable_data_ptr();
  params.forward.element_type = element_type_of(z);
  params.grad_activation = grad_activation.const_data_ptr();
  params.grad_z = into.grad_z.mutable_data_ptr();
  params.grad_row_weights = grad_row_weights.mutable_data_ptr<float>();
  C10_CUDA_CHECK(launch_swiglu_backward(params, stream));
  return into;
}

}  // namespace torch_moe_ep
