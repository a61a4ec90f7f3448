// Notes between the ranks of a job in the store that made its groups, when something fails.
//
// A rank that fails raises an alarm with a group's name. Every rank looks for alarms once in a
// while, and if it is of that group, leaves its statement.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace torch_moe_ep::comm {

class Mailbox {
 public:
  // With a connection of its own where the store is a TCPStore: a client that waits for a key
  // blocks its other threads.
  explicit Mailbox(const c10::intrusive_ptr<c10d::Store>& store);

  // Announces trouble in a group; returns the alarm's number.
  int64_t raise_alarm(const std::string& group_name);
  // Groups of the alarms raised since the last look, by number.
  std::map<int64_t, std::string> new_alarms();

  void state(const std::string& group_name, int64_t alarm, int rank, const std::string& text);
  // Statements of `ranks` to an alarm, by rank; returns when all are there or the grace is over.
  // `meanwhile` is called between the looks: the thread that answers others must not stop to.
  std::map<int, std::string> statements(const std::string& group_name,
                                        int64_t alarm,
                                        const std::vector<int>& ranks,
                                        const std::function<void()>& meanwhile = nullptr);

 private:
  std::mutex mutex_;
  c10::intrusive_ptr<c10d::Store> base_;  // so that its address stays this mailbox's
  c10::intrusive_ptr<c10d::Store> store_;
  int64_t next_alarm_;
};

// The store below all prefixes: the same object for all groups of a job.
c10::intrusive_ptr<c10d::Store> base_store(const c10::intrusive_ptr<c10d::Store>& store);

}  // namespace torch_moe_ep::comm
