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

// Called when the library is loaded.
__attribute__((constructor)) void fill_in() { capture_probe() = {&is_capturing, &has_happened}; }

}  // namespace
}  // namespace torch_moe_ep::comm
