#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <chrono>
#include <thread>

#include "comm/collective.h"
#include "comm/failure.h"

namespace torch_moe_ep::comm {
namespace {

using Clock = std::chrono::steady_clock;

// Counts are there in microseconds unless a rank is late: then the core is given away.
constexpr std::chrono::milliseconds kSpinning(1);
constexpr std::chrono::microseconds kNap(50);

bool is_done_within(const at::cuda::CUDAEvent& event, std::chrono::milliseconds timeout) {
  const auto start = Clock::now();
  while (!event.query()) {
    const auto waited = Clock::now() - start;
    if (waited > timeout) return false;
    if (waited > kSpinning) std::this_thread::sleep_for(kNap);
  }
  return true;
}

}  // namespace

at::Tensor to_host(const at::Tensor& counts, const std::string& group_name) {
  at::Tensor host =
      at::empty(counts.sizes(), counts.options().device(at::kCPU).pinned_memory(true));
  host.copy_(counts, /*non_blocking=*/true);
  at::cuda::CUDAEvent event;
  event.record(at::cuda::getCurrentCUDAStream());
  const auto group = c10d::resolve_process_group(group_name);
  const auto timeout = exchange_timeout(*group, at::kCUDA);
  if (!is_done_within(event, timeout)) {
    raise_failure("exchange of counts",
                  *group,
                  at::kCUDA,
                  "nothing within " + std::to_string(timeout.count() / 1000.0) + " s");
  }
  event.synchronize();
  return host;
}

}  // namespace torch_moe_ep::comm
