// How long calls took on a GPU, by events on the caller's stream, read when they have happened.
//
// A span begins when the caller's stream comes to the call and ends when that stream may go on, so
// it is what the caller's stream gives for it. Two event records a call, no launch, no host wait.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Event.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

namespace torch_moe_ep::comm {

using Clock = std::chrono::steady_clock;

struct Span {
  explicit Span(c10::DeviceType device_type);

  c10::Event start;
  c10::Event end;
  c10::Device device;
  uint64_t number = 0;  // of the call
  size_t counter = 0;   // where its time goes
  Clock::time_point issued;
};

// Not thread-safe; the ledger's lock is held around it.
class Spans {
 public:
  // A span that has begun on the device's current stream; nullptr while the stream is captured into
  // a graph, which would keep the events.
  std::unique_ptr<Span> begin(c10::Device device);
  // Ends it on the device's current stream.
  void end(std::unique_ptr<Span> span);
  // Hands every span that has happened to `take` (counter, milliseconds); waits for none.
  void read(const std::function<void(size_t counter, double milliseconds)>& take);
  // The oldest span that has ended on the host and not on the device, nullptr if none.
  const Span* oldest() const;
  bool is_full() const;

 private:
  std::vector<std::unique_ptr<Span>> free_;
  std::deque<std::unique_ptr<Span>> ended_;
};

// What only a build with CUDA knows; csrc/comm/hooks/capture_cuda.cpp fills it in.
struct CaptureProbe {
  bool (*is_capturing)() = nullptr;
  // Queries an event in a way that breaks no other thread's capture.
  bool (*has_happened)(const c10::Event& event) = nullptr;
};
CaptureProbe& capture_probe();

}  // namespace torch_moe_ep::comm
