#include "comm/label.h"

#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <unordered_map>

namespace torch_moe_ep::comm {
namespace {

thread_local Label label_of_thread;

// Never freed: labels point into it until the process ends. A deque keeps its elements in place.
struct Names {
  std::mutex mutex;
  std::deque<std::string> names;
  std::unordered_map<std::string, int32_t> ids;

  int32_t intern(const std::string& name) {
    if (name.empty()) return 0;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [entry, is_added] = ids.try_emplace(name, static_cast<int32_t>(names.size()) + 1);
    if (is_added) names.push_back(name);
    return entry->second;
  }

  const std::string* find(int32_t id) {
    const std::lock_guard<std::mutex> lock(mutex);
    return id > 0 && id <= static_cast<int32_t>(names.size()) ? &names[id - 1] : nullptr;
  }
};

Names& layers() {
  static auto* names = new Names();
  return *names;
}

Names& stages() {
  static auto* names = new Names();
  return *names;
}

}  // namespace

Label current_label() { return label_of_thread; }

int32_t intern_layer(const std::string& name) { return layers().intern(name); }

std::string layer_name(int32_t layer) {
  const std::string* name = layers().find(layer);
  return name != nullptr ? *name : std::string();
}

uint64_t layer_hash(int32_t layer) {
  const std::string* name = layers().find(layer);
  return name != nullptr ? std::hash<std::string>()(*name) : 0;
}

const char* intern_stage(const std::string& name) {
  const std::string* stage = stages().find(stages().intern(name));
  return stage != nullptr ? stage->c_str() : nullptr;
}

Label exchange_label(Label label) {
  const Label before = label_of_thread;
  label_of_thread = label;
  return before;
}

}  // namespace torch_moe_ep::comm
