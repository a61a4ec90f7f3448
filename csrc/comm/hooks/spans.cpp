#include "comm/hooks/spans.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <memory>
#include <utility>

namespace torch_moe_ep::comm {
namespace {

constexpr size_t kMaxEnded = 4096;  // events in flight; what comes on top is not timed

c10::Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

bool has_happened(const c10::Event& event) {
  const auto probe = capture_probe().has_happened;
  return probe != nullptr ? probe(event) : event.query();
}

}  // namespace

Span::Span(c10::DeviceType device_type)
    : start(device_type, c10::EventFlag::BACKEND_DEFAULT),
      end(device_type, c10::EventFlag::BACKEND_DEFAULT),
      device(device_type) {}

std::unique_ptr<Span> Spans::begin(c10::Device device) {
  const auto is_capturing = capture_probe().is_capturing;
  if (is_full() || (is_capturing != nullptr && is_capturing())) return nullptr;
  std::unique_ptr<Span> span;
  if (!free_.empty() && free_.back()->device == device) {
    span = std::move(free_.back());
    free_.pop_back();
  } else {
    span = std::make_unique<Span>(device.type());
  }
  span->device = device;
  span->issued = Clock::now();
  span->start.record(current_stream(device));
  return span;
}

void Spans::end(std::unique_ptr<Span> span) {
  const auto is_capturing = capture_probe().is_capturing;
  if (is_capturing != nullptr && is_capturing()) return;
  span->end.record(current_stream(span->device));
  ended_.push_back(std::move(span));
}

void Spans::read(const std::function<void(size_t counter, double milliseconds)>& take) {
  while (!ended_.empty() && has_happened(ended_.front()->end)) {
    std::unique_ptr<Span> span = std::move(ended_.front());
    ended_.pop_front();
    take(span->counter, span->start.elapsedTime(span->end));
    free_.push_back(std::move(span));
  }
}

const Span* Spans::oldest() const { return ended_.empty() ? nullptr : ended_.front().get(); }

bool Spans::is_full() const { return ended_.size() >= kMaxEnded; }

CaptureProbe& capture_probe() {
  static CaptureProbe probe;
  return probe;
}

}  // namespace torch_moe_ep::comm
