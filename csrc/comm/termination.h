// What a rank still says when its launcher ends it in the middle of an exchange.
//
// A launcher that has lost one rank sends SIGTERM to the others, long before any time-out: they
// would end without a word on what they were waiting for. The first wait of a process puts a
// handler in front of the one that is there; where a wait is under way when the signal comes, a
// thread writes to the log which exchange it was and which ranks did not take part, and then lets
// the signal do what it would have done. Without a wait under way, and in forked children, nothing
// changes. A handler that is set later replaces this one.
#pragma once

#include <c10/core/DeviceType.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace torch_moe_ep::comm {

// Marks a wait of the host for other ranks, from its making to its end.
class Waiting {
 public:
  Waiting(const char* operation,
          c10::intrusive_ptr<c10d::ProcessGroup> group,
          c10::DeviceType device_type);
  ~Waiting();
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

 private:
  const void* key_;
};

}  // namespace torch_moe_ep::comm
