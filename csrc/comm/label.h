// What the current thread is doing, for reports and counters: a layer's name and a stage's.
//
// The layer is set from Python around a layer's forward, or by an autograd function around its
// backward, which runs on another thread. Stages set theirs where they exchange.
#pragma once

#include <cstdint>
#include <string>

#include "common/visibility.h"

namespace torch_moe_ep::comm {

struct Label {
  int32_t layer = 0;            // of intern_layer; 0: outside of the layers
  const char* stage = nullptr;  // lives as long as the process; nullptr: none
};

TORCH_MOE_EP_API Label current_label();

// A number for a layer's name, the same at every call. Takes a lock.
TORCH_MOE_EP_API int32_t intern_layer(const std::string& name);
// The name of a number; "" for 0.
TORCH_MOE_EP_API std::string layer_name(int32_t layer);
// A hash of the name, the same in every process; 0 for 0.
uint64_t layer_hash(int32_t layer);
// A name that lives as long as the process. Takes a lock.
TORCH_MOE_EP_API const char* intern_stage(const std::string& name);

// Sets the current thread's label and returns the one before.
TORCH_MOE_EP_API Label exchange_label(Label label);

// The label of a scope.
class ScopedLabel {
 public:
  explicit ScopedLabel(Label label) : before_(exchange_label(label)) {}
  ~ScopedLabel() { exchange_label(before_); }
  ScopedLabel(const ScopedLabel&) = delete;
  ScopedLabel& operator=(const ScopedLabel&) = delete;

 private:
  Label before_;
};

// The stage of a scope, unless one is set already: what a backward is called stands.
class ScopedStage {
 public:
  explicit ScopedStage(const char* stage) : scope_(with_stage(stage)) {}

 private:
  static Label with_stage(const char* stage) {
    Label label = current_label();
    if (label.stage == nullptr) label.stage = stage;
    return label;
  }
  ScopedLabel scope_;
};

}  // namespace torch_moe_ep::comm
