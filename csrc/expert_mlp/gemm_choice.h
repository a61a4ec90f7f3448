// Which kernels run a grouped expert GEMM: a pure function of the shape, the device and the user's
// wish, apart from the launch.
#pragma once

#include <string>

#include "expert_mlp/grouped_gemm.h"

namespace torch_moe_ep {

enum class GemmKernels {
  kSm90,          // hand-written wgmma kernels
  kSm80,          // hand-written mma.sync kernels
  kTorchGrouped,  // torch's _grouped_mm
  kTorchLoop,     // one torch matmul an expert; the host needs the segment offsets
};

// TORCH_MOE_EP_KERNELS.
enum class KernelWish { kAuto, kSm90, kSm80, kTorch };

struct GemmRequest {
  GroupedGemmShape shape;
  bool is_bfloat16;
  bool is_aligned;         // all three pointers are multiples of 16 bytes
  int compute_capability;  // 10 * major + minor
};

struct GemmChoice {
  GemmKernels kernels;
  // Why the kernels wished for cannot run this GEMM, a sentence; nullptr when they can.
  const char* refusal;
};

GemmChoice choose_gemm(const GemmRequest& request, KernelWish wish);

// Reads TORCH_MOE_EP_KERNELS=auto|sm90|sm80|torch; throws ValueError on any other word.
KernelWish kernel_wish();

const char* name_of(GemmKernels kernels);

}  // namespace torch_moe_ep
