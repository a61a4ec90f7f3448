#include "expert_mlp/expert_gemms.h"

#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <utility>

#include "common/element_type_of.h"
#include "expert_mlp/swiglu_kernels.h"

namespace torch_moe_ep {
namespace {

constexpr uintptr_t kPointerAlignment = 16;

bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kPointerAlignment == 0;
}

GroupedGemmShape shape_of(GemmLayout layout,
                          const at::Tensor& a,
                          const at::Tensor& b,
                          int64_t num_experts) {
  const int64_t columns = layout == GemmLayout::kNT ? b.size(1) : b.size(-1);
  return {layout, num_experts, a.size(0), columns, a.size(1)};
}

GroupedGemmParams params_of(const GroupedGemmShape& shape,
                            const at::Tensor& a,
                            const at::Tensor& b,
                            const at::Tensor& out,
                            const at::Tensor& expert_offsets) {
  GroupedGemmParams params = {};
  params.shape = shape;
  params.a = a.const_data_ptr();
  params.b = b.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.segments.offsets = expert_offsets.const_data_ptr<int64_t>();
  return params;
}

bool is_hand_written(GemmKernels kernels) {
  return kernels == GemmKernels::kSm90 || kernels == GemmKernels::kSm80;
}

void launch(GemmKernels kernels, const GroupedGemmParams& params) {
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(kernels == GemmKernels::kSm90 ? sm90::grouped_gemm(params, stream)
                                               : sm80::grouped_gemm(params, stream));
}

}  // namespace

ExpertGemms::ExpertGemms(at::Tensor expert_offsets, at::Tensor host_offsets)
    : expert_offsets_(std::move(expert_offsets)), given_host_offsets_(std::move(host_offsets)) {}

GemmKernels ExpertGemms::choose(const GroupedGemmShape& shape,
                                const at::Tensor& a,
                                const at::Tensor& b) const {
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  const GemmRequest request = {shape,
                               a.scalar_type() == at::kBFloat16,
                               is_aligned(a) && is_aligned(b),
                               device->major * 10 + device->minor};
  const GemmChoice choice = choose_gemm(request, kernel_wish());
  TORCH_CHECK(choice.refusal == nullptr,
              "TORCH_MOE_EP_KERNELS asks for kernels that cannot run: ",
              choice.refusal,
              " (unset it, or set it to auto)");
  return choice.kernels;
}

const int64_t* ExpertGemms::num_rows() const {
  return expert_offsets_.const_data_ptr<int64_t>() + expert_offsets_.numel() - 1;
}

const at::Tensor& ExpertGemms::segment_ends() {
  if (!segment_ends_.defined()) {
    segment_ends_ = expert_offsets_.slice(0, 1).to(at::kInt);
  }
  return segment_ends_;
}

const std::vector<int64_t>& ExpertGemms::host_offsets() {
  if (host_offsets_.empty()) {
    // Host sync when only the device knows the offsets.
    const at::Tensor offsets =
        given_host_offsets_.numel() > 0 ? given_host_offsets_ : expert_offsets_.cpu();
    const int64_t* data = offsets.const_data_ptr<int64_t>();
    host_offsets_.assign(data, data + offsets.numel());
  }
  return host_offsets_;
}

at::Tensor ExpertGemms::nt(const at::Tensor& rows, const at::Tensor& weights) {
  return rows_times_weights(GemmLayout::kNT, rows, weights);
}

at::Tensor ExpertGemms::nn(const at::Tensor& rows, const at::Tensor& weights) {
  return rows_times_weights(GemmLayout::kNN, rows, weights);
}

at::Tensor ExpertGemms::rows_times_weights(GemmLayout layout,
                                           const at::Tensor& rows,
                                           const at::Tensor& weights) {
  const GroupedGemmShape shape = shape_of(layout, rows, weights, weights.size(0));
  if (shape.rows == 0) return at::empty({0, shape.columns}, rows.options());
  const GemmKernels kernels = choose(shape, rows, weights);
  const at::Tensor right = layout == GemmLayout::kNT ? weights.transpose(1, 2) : weights;
  if (kernels == GemmKernels::kTorchGrouped) return at::_grouped_mm(rows, right, segment_ends());
  at::Tensor out = at::empty({shape.rows, shape.columns}, rows.options());
  if (is_hand_written(kernels)) {
    launch(kernels, params_of(shape, rows, weights, out, expert_offsets_));
    return out;
  }
  const auto& offsets = host_offsets();
  for (int64_t l = 0; l < shape.num_experts; ++l) {
    const int64_t count = offsets[l + 1] - offsets[l];
    if (count == 0) continue;
    at::Tensor segment = out.narrow(0, offsets[l], count);
    at::mm_out(segment, rows.narrow(0, offsets[l], count), right.select(0, l));
  }
  return out;
}

at::Tensor ExpertGemms::tn(const at::Tensor& rows_a, const at::Tensor& rows_b, double alpha) {
  const int64_t num_experts = expert_offsets_.numel() - 1;
  if (rows_a.size(0) == 0) {
    return at::zeros({num_experts, rows_a.size(1), rows_b.size(1)}, rows_a.options());
  }
  const GroupedGemmShape shape = shape_of(GemmLayout::kTN, rows_a, rows_b, num_experts);
  const GemmKernels kernels = choose(shape, rows_a, rows_b);
  if (kernels == GemmKernels::kTorchGrouped) {
    at::Tensor out = at::_grouped_mm(rows_a.t(), rows_b, segment_ends());
    return alpha == 1.0 ? out : out.mul_(alpha);
  }
  at::Tensor out = at::empty({num_experts, shape.a_columns, shape.columns}, rows_a.options());
  if (is_hand_written(kernels)) {
    GroupedGemmParams params = params_of(shape, rows_a, rows_b, out, expert_offsets_);
    params.alpha = static_cast<float>(alpha);
    launch(kernels, params);
    return out;
  }
  const auto& offsets = host_offsets();
  for (int64_t l = 0; l < num_experts; ++l) {
    const int64_t count = offsets[l + 1] - offsets[l];
    at::Tensor gradient = out.select(0, l);
    if (count == 0) {
      gradient.zero_();
      continue;
    }
    // beta 0: what `gradient` holds is not read.
    at::addmm_out(gradient,
                  gradient,
                  rows_a.narrow(0, offsets[l], count).t(),
                  rows_b.narrow(0, offsets[l], count),
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
  GroupedGemmShape shape = shape_of(GemmLayout::kTN, rows_a, rows_b, sum.size(0));
  if (choose(shape, rows_a, rows_b) == GemmKernels::kSm90 && is_aligned(sum)) {
    shape.epilogue = GemmEpilogue::kAccumulate;
    GroupedGemmParams params = params_of(shape, rows_a, rows_b, sum, expert_offsets_);
    params.alpha = static_cast<float>(alpha);
    launch(GemmKernels::kSm90, params);
    return;
  }
  sum.add_(tn(rows_a, rows_b, alpha));
}

ExpertGemms::GateUp ExpertGemms::nt_swiglu(const at::Tensor& rows,
                                           const at::Tensor& weights,
                                           const at::Tensor& row_weights) {
  GroupedGemmShape shape = shape_of(GemmLayout::kNT, rows, weights, weights.size(0));
  const int64_t width = shape.columns / 2;
  at::Tensor activation = at::empty({shape.rows, width}, rows.options());
  if (choose(shape, rows, weights) == GemmKernels::kSm90) {
    shape.epilogue = GemmEpilogue::kSwiglu;
    if (sm90::is_supported(shape)) {
      at::Tensor z = at::empty({shape.rows, shape.columns}, rows.options());
      GroupedGemmParams params = params_of(shape, rows, weights, z, expert_offsets_);
      params.activation = activation.mutable_data_ptr();
      params.row_weights = row_weights.const_data_ptr<float>();
      launch(GemmKernels::kSm90, params);
      return {z, activation};
    }
  }
  at::Tensor z = nt(rows, weights);
  SwigluParams params = {};
  params.rows = shape.rows;
  params.width = width;
  params.num_rows = num_rows();
  params.z = z.const_data_ptr();
  params.row_weights = row_weights.const_data_ptr<float>();
  params.activation = activation.mutable_data_ptr();
  params.element_type = element_type_of(rows);
  C10_CUDA_CHECK(launch_swiglu(params, at::cuda::getCurrentCUDAStream()));
  return {z, activation};
}

ExpertGemms::SwigluGradients ExpertGemms::nn_swiglu_backward(const at::Tensor& grad_rows,
                                                             const at::Tensor& weights,
                                                             const at::Tensor& z,
                                                             const at::Tensor& row_weights,
                                                             const at::Tensor& grad_row_weights) {
  GroupedGemmShape shape = shape_of(GemmLayout::kNN, grad_rows, weights, weights.size(0));
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  SwigluGradients gradients = {at::empty({shape.rows, shape.columns}, z.options()),
                               at::empty(z.sizes(), z.options())};
  if (choose(shape, grad_rows, weights) == GemmKernels::kSm90 && is_aligned(z) &&
      sm90::fuses_swiglu_backward(shape)) {
    shape.epilogue = GemmEpilogue::kSwigluBackward;
    const int64_t num_tiles = sm90::num_column_tiles(shape);
    const at::Tensor partial_dots = at::empty({num_tiles, shape.rows}, row_weights.options());
    GroupedGemmParams params =
        params_of(shape, grad_rows, weights, gradients.grad_z, expert_offsets_);
    params.activation = gradients.activation.mutable_data_ptr();
    params.row_weights = row_weights.const_data_ptr<float>();
    params.z = z.const_data_ptr();
    params.partial_dots = partial_dots.mutable_data_ptr<float>();
    launch(GemmKernels::kSm90, params);
    C10_CUDA_CHECK(launch_add_up({shape.rows,
                                  num_rows(),
                                  num_tiles,
                                  partial_dots.const_data_ptr<float>(),
                                  grad_row_weights.mutable_data_ptr<float>()},
                                 stream));
    return gradients;
  }
  const at::Tensor grad_activation = nn(grad_rows, weights);
  SwigluBackwardParams params = {};
  params.forward.rows = shape.rows;
  params.forward.width = shape.columns;
  params.forward.num_rows = num_rows();
  params.forward.z = z.const_data_ptr();
  params.forward.row_weights = row_weights.const_data_ptr<float>();
  params.forward.activation = gradients.activation.mutable_data_ptr();
  params.forward.element_type = element_type_of(z);
  params.grad_activation = grad_activation.const_data_ptr();
  params.grad_z = gradients.grad_z.mutable_data_ptr();
  params.grad_row_weights = grad_row_weights.mutable_data_ptr<float>();
  C10_CUDA_CHECK(launch_swiglu_backward(params, stream));
  return gradients;
}

}  // namespace torch_moe_ep
