// Host side of the generic grouped GEMM: what it refuses, which tile, its launch.
#include <algorithm>

#include "expert_mlp/sm80/kernel.cuh"

namespace torch_moe_ep::sm80 {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct DeviceLimits {
  int num_multiprocessors;
  int shared_bytes;  // that one CTA may have
};

cudaError_t device_limits(DeviceLimits* limits) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(
        &limits->num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(
        &limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return error;
}

template <class Config>
cudaError_t launch(const GroupedGemmParams& params, int num_multiprocessors, cudaStream_t stream) {
  const GroupedGemmShape& s = params.shape;
  const bool is_tn = s.layout == GemmLayout::kTN;
  KernelArguments args = {};
  args.a = static_cast<const __nv_bfloat16*>(params.a);
  args.b = static_cast<const __nv_bfloat16*>(params.b);
  args.out = static_cast<__nv_bfloat16*>(params.out);
  args.columns = s.columns;
  args.a_columns = s.a_columns;
  args.alpha = is_tn ? params.alpha : 1.0f;
  const int64_t tiles_m = ceil_div(s.a_columns, Config::kBlockM);
  args.space.segments = params.segments;
  args.space.num_experts = static_cast<int>(s.num_experts);
  args.space.fixed_tiles_m = is_tn ? static_cast<int>(tiles_m) : 0;
  args.space.tiles_n = static_cast<int>(ceil_div(s.columns, Config::kBlockN));
  args.space.group_m = 8;
  const int64_t max_tiles =
      (is_tn ? s.num_experts * tiles_m : s.rows / Config::kBlockM) * args.space.tiles_n;
  const cudaError_t error = cudaFuncSetAttribute(grouped_gemm_kernel<Config>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(max_tiles, num_multiprocessors));
  grouped_gemm_kernel<Config><<<blocks, kThreads, Config::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

// 128 x 256 needs 150 KiB of shared memory (8.0, 9.0); other devices have 99 KiB.
template <GemmLayout kLayout>
cudaError_t launch_layout(const GroupedGemmParams& params, cudaStream_t stream) {
  using Wide = KernelConfig<kLayout, 256, 3>;
  using Narrow = KernelConfig<kLayout, 128, 2>;
  DeviceLimits limits = {};
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  if (std::min(limits.shared_bytes, params.max_shared_bytes) >= Wide::kSharedBytes) {
    return launch<Wide>(params, limits.num_multiprocessors, stream);
  }
  return launch<Narrow>(params, limits.num_multiprocessors, stream);
}

}  // namespace

const char* refusal(const GroupedGemmShape& shape) {
  constexpr int64_t kMaxIndex = int64_t{1} << 31;
  if (shape.epilogue != GemmEpilogue::kPlain) {
    return "the sm80 grouped GEMM has the plain epilogue alone";
  }
  if (shape.num_experts < 1 || shape.num_experts > kMaxLocalExperts) {
    return "the sm80 grouped GEMM takes 1 to 512 local experts";
  }
  if (shape.columns < 8 || shape.columns % 8 != 0 || shape.a_columns < 8 ||
      shape.a_columns % 8 != 0) {
    return "the sm80 grouped GEMM takes column counts that are positive multiples of 8";
  }
  if (shape.rows < 0 || shape.rows % kRowAlignment != 0) {
    return "the sm80 grouped GEMM takes a row count that is a multiple of 128";
  }
  if (shape.rows >= kMaxIndex || shape.columns >= kMaxIndex / 2 ||
      shape.a_columns >= kMaxIndex / 2) {
    return "the sm80 grouped GEMM takes fewer than 2^31 rows and 2^30 columns";
  }
  const int64_t tiles_m = shape.layout == GemmLayout::kTN
                              ? shape.num_experts * ceil_div(shape.a_columns, 128)
                              : shape.rows / 128;
  if (tiles_m * ceil_div(shape.columns, 128) >= kMaxIndex) {
    return "the sm80 grouped GEMM takes results of fewer than 2^31 tiles";
  }
  return nullptr;
}

cudaError_t grouped_gemm(const GroupedGemmParams& params, cudaStream_t stream) {
  const GroupedGemmShape& s = params.shape;
  if (!is_supported(s)) return cudaErrorInvalidValue;
  const bool is_tn = s.layout == GemmLayout::kTN;
  if (s.rows == 0) {
    if (!is_tn) return cudaSuccess;
    return cudaMemsetAsync(params.out, 0, s.num_experts * s.a_columns * s.columns * 2, stream);
  }
  switch (s.layout) {
    case GemmLayout::kNT:
      return launch_layout<GemmLayout::kNT>(params, stream);
    case GemmLayout::kNN:
      return launch_layout<GemmLayout::kNN>(params, stream);
    case GemmLayout::kTN:
      return launch_layout<GemmLayout::kTN>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace torch_moe_ep::sm80
