#include "comm/hooks/mailbox.h"

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <chrono>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "comm/hooks/watcher.h"

namespace torch_moe_ep::comm {
namespace {

// Several looks for alarms, and a busy machine.
constexpr std::chrono::milliseconds kGrace = 6 * kLookEvery;
constexpr std::chrono::milliseconds kBetweenLooks(20);
constexpr const char* kAlarms = "torch_moe_ep/hooks/alarms";

std::string alarm_key(int64_t alarm) { return "torch_moe_ep/hooks/alarm/" + std::to_string(alarm); }

std::string statement_key(const std::string& group_name, int64_t alarm, int rank) {
  return "torch_moe_ep/hooks/" + group_name + "/" + std::to_string(alarm) + "/" +
         std::to_string(rank);
}

c10::intrusive_ptr<c10d::Store> connection_to(const c10::intrusive_ptr<c10d::Store>& store) {
  return c10::dynamic_intrusive_pointer_cast<c10d::TCPStore>(store) ? store->clone() : store;
}

}  // namespace

Mailbox::Mailbox(const c10::intrusive_ptr<c10d::Store>& store)
    : base_(store), store_(connection_to(store)), next_alarm_(store_->add(kAlarms, 0) + 1) {}

int64_t Mailbox::raise_alarm(const std::string& group_name) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t alarm = store_->add(kAlarms, 1);
  store_->set(alarm_key(alarm), group_name);
  return alarm;
}

std::map<int64_t, std::string> Mailbox::new_alarms() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::map<int64_t, std::string> alarms;
  while (store_->check({alarm_key(next_alarm_)})) {
    alarms[next_alarm_] = store_->get_to_str(alarm_key(next_alarm_));
    ++next_alarm_;
  }
  return alarms;
}

void Mailbox::state(const std::string& group_name,
                    int64_t alarm,
                    int rank,
                    const std::string& text) {
  const std::lock_guard<std::mutex> lock(mutex_);
  store_->set(statement_key(group_name, alarm, rank), text);
}

std::map<int, std::string> Mailbox::statements(const std::string& group_name,
                                               int64_t alarm,
                                               const std::vector<int>& ranks,
                                               const std::function<void()>& meanwhile) {
  std::map<int, std::string> said;
  const auto deadline = std::chrono::steady_clock::now() + kGrace;
  while (said.size() < ranks.size() && std::chrono::steady_clock::now() < deadline) {
    for (const int rank : ranks) {
      const std::lock_guard<std::mutex> lock(mutex_);
      const std::string key = statement_key(group_name, alarm, rank);
      if (said.count(rank) == 0 && store_->check({key})) said[rank] = store_->get_to_str(key);
    }
    if (said.size() == ranks.size()) break;
    if (meanwhile) meanwhile();
    std::this_thread::sleep_for(kBetweenLooks);
  }
  return said;
}

c10::intrusive_ptr<c10d::Store> base_store(const c10::intrusive_ptr<c10d::Store>& store) {
  const auto prefixed = c10::dynamic_intrusive_pointer_cast<c10d::PrefixStore>(store);
  return prefixed ? prefixed->getUnderlyingNonPrefixStore() : store;
}

}  // namespace torch_moe_ep::comm
