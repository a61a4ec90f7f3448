#include "comm/hooks/attach.h"

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "comm/hooks/hooked_backend.h"
#include "comm/hooks/registry.h"
#include "comm/hooks/report.h"

namespace torch_moe_ep::comm {
namespace {

using BackendPtr = c10::intrusive_ptr<c10d::Backend>;

// c10d can add a backend to a group but not exchange one; its tables are protected members.
struct Tables : c10d::ProcessGroup {
  static auto& by_device(c10d::ProcessGroup& group) {
    return group.*(&Tables::deviceTypeToBackend_);
  }
  static auto& by_type(c10d::ProcessGroup& group) {
    return group.*(&Tables::backendTypeToBackend_);
  }
};

HookedBackend* as_hooked(const BackendPtr& backend) {
  return dynamic_cast<HookedBackend*>(backend.get());
}

BackendPtr make_hooked(const BackendPtr& inner,
                       c10d::ProcessGroup& group,
                       const std::vector<uint64_t>& global_ranks) {
  Place place;
  place.rank = inner->getRank();
  place.size = inner->getSize();
  place.global_ranks = global_ranks;
  place.store = group.getStore();
  auto hooked = c10::make_intrusive<HookedBackend>(inner, std::move(place));
  hooked->set_group(&group);
  if (!inner->getGroupDesc().empty()) hooked->setGroupDesc(inner->getGroupDesc());
  // A group in the making gets its name later, through the backend.
  if (!inner->getGroupUid().empty()) hooked->setGroupUid(inner->getGroupUid());
  return hooked;
}

}  // namespace

void attach_hooks(const c10::intrusive_ptr<c10d::ProcessGroup>& group,
                  const std::vector<uint64_t>& global_ranks) {
  std::map<c10d::Backend*, BackendPtr> hooked;
  const auto exchange = [&](BackendPtr& backend) {
    if (as_hooked(backend) != nullptr) return;
    BackendPtr& made = hooked[backend.get()];
    if (!made) made = make_hooked(backend, *group, global_ranks);
    backend = made;
  };
  for (auto& entry : Tables::by_device(*group)) exchange(entry.second);
  for (auto& entry : Tables::by_type(*group)) exchange(entry.second);
}

void detach_hooks(const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  const auto restore = [](BackendPtr& backend) {
    HookedBackend* hooked = as_hooked(backend);
    if (hooked == nullptr) return;
    hooked->retire();
    backend = hooked->inner();
  };
  for (auto& entry : Tables::by_device(*group)) restore(entry.second);
  for (auto& entry : Tables::by_type(*group)) restore(entry.second);
}

bool has_hooks(const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  for (const auto& entry : Tables::by_device(*group)) {
    if (as_hooked(entry.second) != nullptr) return true;
  }
  return false;
}

std::vector<StageCount> stage_counts(const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  std::map<std::pair<std::string, std::string>, StageCount> sums;
  for (const auto& ledger : live_ledgers()) {
    if (group && ledger->place().group_name != group->getGroupName()) continue;
    for (const StageCount& count : ledger->counts()) {
      StageCount& sum = sums[{count.group, count.stage}];
      sum.group = count.group;
      sum.stage = count.stage;
      sum.calls += count.calls;
      sum.bytes += count.bytes;
      sum.milliseconds += count.milliseconds;
      sum.timed += count.timed;
    }
  }
  std::vector<StageCount> counts;
  counts.reserve(sums.size());
  for (auto& entry : sums) counts.push_back(std::move(entry.second));
  return counts;
}

void reset_stage_counts() {
  for (const auto& ledger : live_ledgers()) ledger->reset_counts();
}

void read_times() {
  for (const auto& ledger : live_ledgers()) ledger->read_spans();
}

std::optional<std::string> explain_by_hooks(c10d::ProcessGroup& group,
                                            c10::DeviceType device_type,
                                            const std::string& backend_message) {
  const HookedBackend* hooked = as_hooked(group.getBackend(device_type));
  if (hooked == nullptr) return std::nullopt;
  const auto call = hooked->ledger()->last_call();
  if (!call.has_value()) return std::nullopt;
  return explain(*hooked->ledger(), *call, backend_message);
}

}  // namespace torch_moe_ep::comm
