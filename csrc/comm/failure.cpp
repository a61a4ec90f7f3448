#include "comm/failure.h"

#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "comm/hooks/attach.h"
#include "comm/timeout.h"

namespace torch_moe_ep::comm {
namespace {

constexpr std::string_view kOurs = "torch_moe_ep: ";

std::string key_of(int64_t group_rank) {
  return "torch_moe_ep/gave_up/" + std::to_string(group_rank);
}

using StorePtr = c10::intrusive_ptr<c10d::Store>;

// Group ranks that did not give up within the time to name them.
std::vector<int64_t> silent_ranks(c10d::ProcessGroup& group, const StorePtr& store) {
  TORCH_CHECK(store, "the group has no store");
  store->set(key_of(group.getRank()), std::string("1"));
  std::this_thread::sleep_for(kTimeToName);
  std::vector<int64_t> silent;
  for (int64_t rank = 0; rank < group.getSize(); ++rank) {
    if (!store->check({key_of(rank)})) silent.push_back(rank);
  }
  return silent;
}

std::string describe_silent(c10d::ProcessGroup& group,
                            c10::DeviceType device_type,
                            const StorePtr& store) {
  const auto silent = silent_ranks(group, store);
  if (silent.empty()) return "every rank of the group gave up in it";
  std::string ranks;
  for (const int64_t rank : silent) {
    if (!ranks.empty()) ranks += ", ";
    ranks += std::to_string(global_rank(group, device_type, rank));
  }
  return "global ranks that did not take part: " + ranks +
         " (dead, stuck elsewhere, or slower than the time-out)";
}

// What the hooks say where the group has them: they threw the backend's error, or are asked.
std::optional<std::string> hooks_say(c10d::ProcessGroup& group,
                                     c10::DeviceType device_type,
                                     const std::string& backend_message) {
  if (backend_message.rfind(kOurs, 0) == 0) return backend_message.substr(kOurs.size());
  auto said = explain_by_hooks(group, device_type, backend_message);
  if (said.has_value()) said = said->substr(kOurs.size());
  return said;
}

std::string describe(const std::string& operation,
                     c10d::ProcessGroup& group,
                     c10::DeviceType device_type,
                     const std::string& backend_message,
                     const std::function<StorePtr()>& store) {
  const auto said = hooks_say(group, device_type, backend_message);
  if (said.has_value()) return c10::str(kOurs, "the ", operation, " failed; ", *said);
  std::string silent;
  std::string here = "unknown";
  try {
    here = std::to_string(global_rank(group, device_type, group.getRank()));
    silent = describe_silent(group, device_type, store());
  } catch (const std::exception&) {
    silent = describe_store(group.getStore());
  }
  return c10::str(kOurs,
                  "the ",
                  operation,
                  " failed on global rank ",
                  here,
                  "; ",
                  silent,
                  ". The backend said: ",
                  backend_message);
}

}  // namespace

// The default group lists no ranks: its group ranks are the global ones.
int64_t global_rank(c10d::ProcessGroup& group, c10::DeviceType device_type, int64_t group_rank) {
  const auto ranks = group.getBackend(device_type)->getBackendOptions()->global_ranks_in_group;
  return ranks.empty() ? group_rank : static_cast<int64_t>(ranks.at(group_rank));
}

std::string describe_store(StorePtr store) {
  while (const auto prefixed = c10::dynamic_intrusive_pointer_cast<c10d::PrefixStore>(store)) {
    store = prefixed->getUnderlyingStore();
  }
  const auto tcp = c10::dynamic_intrusive_pointer_cast<c10d::TCPStore>(store);
  if (!tcp)
    return "the ranks at fault are unknown, the group's store is missing or does not answer";
  return "the process that holds the group's store (" + tcp->getHost() + ":" +
         std::to_string(tcp->getPort()) +
         ") does not answer: global rank 0 is dead, or the launcher where it holds the store";
}

void raise_failure(const std::string& operation,
                   c10d::ProcessGroup& group,
                   c10::DeviceType device_type,
                   const std::string& backend_message) {
  const auto store = [&] { return group.getStore(); };
  TORCH_CHECK(false, describe(operation, group, device_type, backend_message, store));
}

std::string describe_failure_beside(const std::string& operation,
                                    c10d::ProcessGroup& group,
                                    c10::DeviceType device_type,
                                    const std::string& reason) {
  const auto store = [&] { return group.getStore()->clone(); };
  return describe(operation, group, device_type, reason, store);
}

}  // namespace torch_moe_ep::comm
