#include "comm/hooks/registry.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace torch_moe_ep::comm {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<std::weak_ptr<Ledger>> ledgers;
};

Registry& registry() {
  static auto* instance = new Registry();  // never freed: groups may outlive static objects
  return *instance;
}

}  // namespace

void register_ledger(const std::shared_ptr<Ledger>& ledger) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().ledgers.push_back(ledger);
}

void unregister_ledger(const Ledger* ledger) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  auto& ledgers = registry().ledgers;
  const auto is_it = [&](const std::weak_ptr<Ledger>& weak) {
    const auto alive = weak.lock();
    return alive == nullptr || alive.get() == ledger;
  };
  ledgers.erase(std::remove_if(ledgers.begin(), ledgers.end(), is_it), ledgers.end());
}

std::vector<std::shared_ptr<Ledger>> live_ledgers() {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  std::vector<std::shared_ptr<Ledger>> live;
  for (const auto& weak : registry().ledgers) {
    if (auto ledger = weak.lock()) live.push_back(std::move(ledger));
  }
  return live;
}

}  // namespace torch_moe_ep::comm
