#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "comm/side_stream.h"

namespace torch_moe_ep::comm {
namespace {

c10::cuda::CUDAStream make_stream(c10::Device device, SideStream::Priority priority) {
  const c10::cuda::CUDAGuard guard(device);
  int least = 0;
  int greatest = 0;
  C10_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  const int wanted = priority == SideStream::Priority::kHigh ? greatest : least;
  cudaStream_t stream = nullptr;
  C10_CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, wanted));
  return c10::cuda::getStreamFromExternal(stream, device.index());
}

}  // namespace

void make_wait(const c10::cuda::CUDAStream& waiting, const c10::cuda::CUDAStream& done) {
  at::cuda::CUDAEvent event;
  event.record(done);
  event.block(waiting);
}

SideStream::SideStream(c10::Device device, Priority priority)
    : stream_(make_stream(device, priority)) {}

void SideStream::fork() const {
  make_wait(stream_, c10::cuda::getCurrentCUDAStream(stream_.device_index()));
}

void SideStream::join() const {
  make_wait(c10::cuda::getCurrentCUDAStream(stream_.device_index()), stream_);
}

}  // namespace torch_moe_ep::comm
