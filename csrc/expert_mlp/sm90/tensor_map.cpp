#include "expert_mlp/sm90/tensor_map.h"

namespace torch_moe_ep::sm90 {
namespace {

using EncodeFunction = decltype(&cuTensorMapEncodeTiled);

// From the driver at run time, so that the library does not link libcuda: it loads without a
// driver.
EncodeFunction encode_function() {
  static const EncodeFunction function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<EncodeFunction>(found ? entry : nullptr);
  }();
  return function;
}

}  // namespace

cudaError_t encode_tensor_map(const TensorMapSpec& spec, CUtensorMap* map) {
  const EncodeFunction encode = encode_function();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t stride_bytes[4];
  const int element_bytes = spec.is_float32 ? 4 : 2;
  for (int i = 0; i + 1 < spec.rank; ++i) stride_bytes[i] = spec.strides[i] * element_bytes;
  constexpr cuuint32_t kUnitSteps[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      map,
      spec.is_float32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      spec.rank,
      const_cast<void*>(spec.address),
      reinterpret_cast<const cuuint64_t*>(spec.sizes),
      stride_bytes,
      spec.box,
      kUnitSteps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      spec.swizzle == Swizzle::k128Bytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace torch_moe_ep::sm90
