// For data of 16 bits: a few units in the last place of fp32 off, far below one rounding of theirs.
#pragma once

namespace torch_moe_ep {

// 1 / (1 + exp(-x)) in four instructions. The instructions are named, since __expf and __fdividef
// spend as many again on subnormal intermediate results, which make no difference here: for
// x < -87.3 the result is zero either way.
__device__ __forceinline__ float fast_sigmoid(float x) {
  constexpr float kMinusLog2E = -1.4426950408889634f;
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * kMinusLog2E));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

}  // namespace torch_moe_ep
