#include <c10/cuda/CUDAGraphsC10Utils.h>

#include "comm/hooks/spans.h"

namespace torch_moe_ep::comm {
namespace {

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

bool has_happened(const c10::Event& event) {
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeThreadLocal);
  return event.query();
}

const bool kIsFilledIn = [] {
  capture_probe() = {&is_capturing, &has_happened};
  return true;
}();

}  // namespace
}  // namespace torch_moe_ep::comm
