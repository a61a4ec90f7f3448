#include "expert_mlp/gemm_choice.h"

#include <c10/util/Exception.h>
#include <c10/util/env.h>

namespace torch_moe_ep {
namespace {

constexpr int kBytesPerElement = 2;
constexpr int kTmaAlignment = 16;

const char* common_refusal(const GemmRequest& request) {
  if (!request.is_bfloat16) return "the hand-written grouped GEMMs take bfloat16 only";
  if (!request.is_aligned) return "the hand-written grouped GEMMs take 16-byte aligned tensors";
  return nullptr;
}

const char* sm90_refusal(const GemmRequest& request) {
  if (const char* refusal = common_refusal(request)) return refusal;
  if (request.compute_capability != 90) {
    return "the sm90 grouped GEMMs need a GPU of compute capability 9.0";
  }
  return sm90::refusal(request.shape);
}

const char* sm80_refusal(const GemmRequest& request) {
  if (const char* refusal = common_refusal(request)) return refusal;
  if (request.compute_capability < 80) {
    return "the sm80 grouped GEMMs need a GPU of compute capability 8.0 or later";
  }
  return sm80::refusal(request.shape);
}

// torch loops over experts with a host sync of its own where its CUTLASS kernel does not apply
// (other types, other architectures); our loop is at least as good there.
bool fits_torch_grouped(const GemmRequest& request) {
  const GroupedGemmShape& shape = request.shape;
  return request.is_bfloat16 && request.is_aligned && request.compute_capability == 90 &&
         shape.rows > 0 && shape.columns * kBytesPerElement % kTmaAlignment == 0 &&
         shape.a_columns * kBytesPerElement % kTmaAlignment == 0;
}

GemmKernels choose_torch(const GemmRequest& request) {
  return fits_torch_grouped(request) ? GemmKernels::kTorchGrouped : GemmKernels::kTorchLoop;
}

}  // namespace

GemmChoice choose_gemm(const GemmRequest& request, KernelWish wish) {
  switch (wish) {
    case KernelWish::kTorch:
      return {choose_torch(request), nullptr};
    case KernelWish::kSm90:
      return {GemmKernels::kSm90, sm90_refusal(request)};
    case KernelWish::kSm80:
      return {GemmKernels::kSm80, sm80_refusal(request)};
    case KernelWish::kAuto:
      break;
  }
  if (sm90_refusal(request) == nullptr) return {GemmKernels::kSm90, nullptr};
  // On 9.0 torch's CUTLASS kernel is the faster of the two that are left.
  if (request.compute_capability != 90 && sm80_refusal(request) == nullptr) {
    return {GemmKernels::kSm80, nullptr};
  }
  return {choose_torch(request), nullptr};
}

KernelWish kernel_wish() {
  const std::string wish = c10::utils::get_env("TORCH_MOE_EP_KERNELS").value_or("auto");
  if (wish == "auto" || wish.empty()) return KernelWish::kAuto;
  if (wish == "sm90") return KernelWish::kSm90;
  if (wish == "sm80") return KernelWish::kSm80;
  if (wish == "torch") return KernelWish::kTorch;
  TORCH_CHECK_VALUE(false, "TORCH_MOE_EP_KERNELS must be auto, sm90, sm80 or torch, got ", wish);
}

const char* name_of(GemmKernels kernels) {
  switch (kernels) {
    case GemmKernels::kSm90:
      return "sm90";
    case GemmKernels::kSm80:
      return "sm80";
    case GemmKernels::kTorchGrouped:
      return "torch grouped_mm";
    case GemmKernels::kTorchLoop:
      return "torch mm per expert";
  }
  return "unknown";
}

}  // namespace torch_moe_ep
