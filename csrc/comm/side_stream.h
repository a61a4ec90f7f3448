// A CUDA stream of our own beside the current one, which forks to it and joins it again by events.
#pragma once

#include <c10/core/Device.h>
#include <c10/cuda/CUDAStream.h>

namespace torch_moe_ep::comm {

// What is put on `waiting` from here on comes after all that `done` holds. No host wait.
void make_wait(const c10::cuda::CUDAStream& waiting, const c10::cuda::CUDAStream& done);

// Not one of torch's pool, whose streams are handed out in turn: it would be FSDP's as well at
// times. Lives as long as the process. Under CUDA graph capture the forks and joins are captured.
class SideStream {
 public:
  // kHigh: its blocks start before those of the current stream that wait for a multiprocessor.
  enum class Priority { kNormal, kHigh };
  SideStream(c10::Device device, Priority priority);

  const c10::cuda::CUDAStream& stream() const { return stream_; }
  // It goes on after what the current stream holds so far.
  void fork() const;
  // The current stream goes on after what this one holds so far. Memory of the current stream that
  // was used here may be freed from then on.
  void join() const;

 private:
  c10::cuda::CUDAStream stream_;
};

}  // namespace torch_moe_ep::comm
