// The order in which a rank issues its collectives, held against what it did before and against
// the other ranks: several communicators on one device wait for each other for ever when two ranks
// disagree about it.
#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/hooks/call.h"
#include "comm/hooks/mailbox.h"
#include "common/visibility.h"

namespace torch_moe_ep::comm {

// One for the process; off until it is started.
//
// A step runs from the begin of a model's forward to the begin of the next one. Only what is issued
// inside of a forward or a backward counts: a script may all-reduce its own numbers when it likes.
// The first step of each kind (training, no_sync, evaluation, recomputation) is recorded and, when
// the next step begins, compared between all ranks. Later steps follow what was recorded. A rank
// that leaves it asks the others: if every rank leaves it in the same way (a loop that has another
// form every tenth step), that is recorded too; else it raises, before it issues the collective.
//
// The ranks meet in the store, at first steps and departures alone; in between a call costs a
// look-up. Raises RuntimeError.
class TORCH_MOE_EP_API OrderGuard {
 public:
  static OrderGuard& get();

  // `store`: reached by all ranks, the same for all; forgets everything recorded.
  void start(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size);
  void stop();

  // A forward begins. Inside of a backward (recomputation) the step around it goes on afterwards.
  void begin_forward(const std::string& kind, bool is_inside_backward);
  void end_forward();

  // A collective is about to be issued on a group of `size` ranks.
  void note(const Call& call, const std::string& group, int size);

  // Where this rank is, for another that asks; "" while the guard is off. Takes no lock.
  std::string position() const;
  int rank() const { return rank_; }

 private:
  struct Node {
    std::string text;
    std::map<uint64_t, std::unique_ptr<Node>> next;
  };
  struct Kind {
    Node root;
    bool is_shared = false;    // the first step was compared
    bool is_given_up = false;  // it changes too often
    int num_learned = 0;       // departures that all ranks made together
  };
  struct Step {
    std::string kind;
    int64_t forward = 0;
    int64_t place = 0;
    Node* at = nullptr;
    std::string texts;  // of a first step, one call a line
  };

  void begin_step(const std::string& kind);
  void compare_first_step();
  std::string verdict_on_first_step(const std::string& key);
  void depart(Kind& kind, Step& step, uint64_t print, const std::string& text);
  std::vector<int> ranks_ahead(const Step& step);

  std::mutex mutex_;
  std::atomic<bool> is_on_ = false;
  std::atomic<int64_t> forward_ = 0;
  std::atomic<int64_t> place_ = 0;
  c10::intrusive_ptr<c10d::Store> store_;
  std::shared_ptr<Mailbox> mailbox_;
  int rank_ = 0;
  int size_ = 1;
  std::map<std::string, Kind> kinds_;
  std::vector<Step> steps_;  // the last one runs
};

// The alarm by which a rank asks for positions.
constexpr const char* kOrderTopic = "order";

}  // namespace torch_moe_ep::comm
