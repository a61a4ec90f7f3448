#include "comm/hooks/ledger.h"

#include <c10/util/Exception.h>
#include <c10/util/env.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace torch_moe_ep::comm {
namespace {

constexpr size_t kNumRecent = 64;        // calls that a rank can tell others of
constexpr size_t kMaxWatched = 1 << 12;  // works that nobody waits for; the oldest are forgotten

}  // namespace

Ticket Ledger::begin(Call& call, bool is_between_two) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_.empty()) {
    const std::string message = std::exchange(failure_, "");
    TORCH_CHECK(false, message);
  }
  Ticket ticket;
  ticket.counter = counter_of(call.label.stage != nullptr ? call.label.stage : call.operation);
  StageCount& count = counters_[ticket.counter].count;
  ++count.calls;
  count.bytes += call.sent_bytes;
  if (!is_between_two) {
    call.number = ++num_begun_;
    ticket.number = call.number;
    if (recent_.size() == kNumRecent) recent_.pop_front();
    recent_.push_back(call);
  }
  if (!hook_settings().is_timed) return ticket;
  ticket.started = Clock::now();
  if (call.device.has_value() && !call.device->is_cpu()) {
    if (spans_.is_full()) read_spans_locked();
    ticket.span = spans_.begin(*call.device);
    if (ticket.span != nullptr) {
      ticket.span->number = ticket.number;
      ticket.span->counter = ticket.counter;
    }
  }
  return ticket;
}

void Ledger::end(Ticket& ticket, bool is_timed) {
  const std::lock_guard<std::mutex> lock(mutex_);
  last_ended_ = std::max(last_ended_, ticket.number);
  const bool has_clock = is_timed && ticket.started != Clock::time_point();
  if (ticket.span != nullptr) {
    if (has_clock) spans_.end(std::move(ticket.span));
    ticket.span.reset();
  } else if (has_clock) {
    StageCount& count = counters_[ticket.counter].count;
    const std::chrono::duration<double, std::milli> took = Clock::now() - ticket.started;
    count.milliseconds += took.count();
    ++count.timed;
  }
}

void Ledger::watch(uint64_t number, const c10::intrusive_ptr<c10d::Work>& work) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (watched_.size() == kMaxWatched) watched_.pop_front();
  watched_.push_back({number, Clock::now(), c10::weak_intrusive_ptr<c10d::Work>(work)});
}

void Ledger::rename(const std::string& group_name, const std::string& description) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!group_name.empty()) place_.group_name = group_name;
  if (!description.empty()) place_.description = description;
}

Place Ledger::place() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return place_;
}

std::string Ledger::statement() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::ostringstream text;
  text << num_begun_ << ' ' << last_ended_;
  for (const Call& call : recent_) text << '\n' << to_line(call);
  return text.str();
}

std::optional<Call> Ledger::call_of(uint64_t number) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Call& call : recent_) {
    if (call.number == number) return call;
  }
  return std::nullopt;
}

std::optional<Call> Ledger::last_call() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return recent_.empty() ? std::nullopt : std::optional<Call>(recent_.back());
}

std::optional<Call> Ledger::overdue(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  read_spans_locked();
  const auto limit = Clock::now() - timeout;
  uint64_t number = 0;
  const Span* oldest = spans_.oldest();
  if (oldest != nullptr && oldest->issued < limit) number = oldest->number;
  while (number == 0 && !watched_.empty() && watched_.front().issued < limit) {
    const Watched& watched = watched_.front();
    const auto work = watched.work.lock();
    if (work && !work->isCompleted()) {
      number = watched.number;
    } else {
      watched_.pop_front();
    }
  }
  const bool is_known = number <= last_overdue_;
  last_overdue_ = std::max(last_overdue_, number);
  lock.unlock();
  return is_known ? std::nullopt : call_of(number);
}

void Ledger::fail(std::string message) {
  const std::lock_guard<std::mutex> lock(mutex_);
  failure_ = std::move(message);
}

std::vector<StageCount> Ledger::counts() {
  const std::lock_guard<std::mutex> lock(mutex_);
  read_spans_locked();
  std::vector<StageCount> counts;
  counts.reserve(counters_.size());
  for (const Counter& counter : counters_) {
    if (counter.count.calls == 0 && counter.count.timed == 0) continue;
    counts.push_back(counter.count);
    counts.back().group = place_.description.empty() ? place_.group_name : place_.description;
  }
  return counts;
}

void Ledger::reset_counts() {
  const std::lock_guard<std::mutex> lock(mutex_);
  read_spans_locked();
  for (Counter& counter : counters_) counter.count = {"", counter.stage, 0, 0, 0, 0};
}

void Ledger::read_spans() {
  const std::lock_guard<std::mutex> lock(mutex_);
  read_spans_locked();
}

// A handful of stages a group: a list is searched by address.
size_t Ledger::counter_of(const char* stage) {
  for (size_t idx = 0; idx < counters_.size(); ++idx) {
    if (counters_[idx].stage == stage) return idx;
  }
  counters_.push_back({stage, {"", stage, 0, 0, 0, 0}});
  return counters_.size() - 1;
}

void Ledger::read_spans_locked() {
  spans_.read([this](size_t counter, double milliseconds) {
    counters_[counter].count.milliseconds += milliseconds;
    ++counters_[counter].count.timed;
  });
}

HookSettings& hook_settings() {
  static HookSettings settings = {true,
                                  c10::utils::check_env("TORCH_MOE_EP_CHECK").value_or(false)};
  return settings;
}

}  // namespace torch_moe_ep::comm
