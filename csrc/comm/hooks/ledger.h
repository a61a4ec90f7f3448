// What the hooks know of one backend of one group: its recent calls, counters and spans.
#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "comm/hooks/call.h"
#include "comm/hooks/spans.h"
#include "common/visibility.h"

namespace torch_moe_ep::comm {

// Calls of one stage since the last reset, on this rank.
struct StageCount {
  std::string group;  // description of the group, such as "mesh_ep"
  std::string stage;  // the label's, else the operation
  int64_t calls = 0;  // started
  int64_t bytes = 0;  // of this rank's inputs
  double milliseconds =
      0;  // of `timed` calls: device time on a GPU, else from start to end of wait
  int64_t timed = 0;
};

// Which rank of which group this is.
struct Place {
  int rank = 0;
  int size = 1;
  std::vector<uint64_t> global_ranks;  // empty: the group's ranks are the global ones
  std::string group_name;              // the same on all ranks of the group, once it is named
  std::string description;
  c10::intrusive_ptr<c10d::Store> store;

  uint64_t global_rank(size_t group_rank) const {
    return global_ranks.empty() ? group_rank : global_ranks.at(group_rank);
  }
};

// One call from its start to its end.
struct Ticket {
  uint64_t number = 0;
  size_t counter = 0;
  Clock::time_point started;
  std::unique_ptr<Span> span;
};

class Ledger {
 public:
  explicit Ledger(Place place) : place_(std::move(place)) {}

  // Numbers and counts a call, and starts its clock. `is_between_two`: send and receive, which the
  // other ranks of the group do not see, get no number.
  Ticket begin(Call& call, bool is_between_two);
  // Its caller may go on. A call without a clock (`is_timed` false) counts no time.
  void end(Ticket& ticket, bool is_timed);
  // A call whose work nobody has waited for yet; looked at when it is overdue.
  void watch(uint64_t number, const c10::intrusive_ptr<c10d::Work>& work);

  void rename(const std::string& group_name, const std::string& description);
  Place place() const;

  // What other ranks read: how many calls have begun, the number of the last that ended, and the
  // most recent calls, one a line.
  std::string statement() const;
  std::optional<Call> call_of(uint64_t number) const;
  std::optional<Call> last_call() const;
  // A call that has not ended on the device though it was issued longer ago, each once; waits for
  // nothing.
  std::optional<Call> overdue(std::chrono::milliseconds timeout);

  // Said once by the next call that begins.
  void fail(std::string message);

  std::vector<StageCount> counts();
  void reset_counts();
  void read_spans();

 private:
  struct Counter {
    const char* stage;
    StageCount count;
  };
  struct Watched {
    uint64_t number;
    Clock::time_point issued;
    c10::weak_intrusive_ptr<c10d::Work> work;
  };

  size_t counter_of(const char* stage);
  void read_spans_locked();

  mutable std::mutex mutex_;
  Place place_;
  std::deque<Call> recent_;
  uint64_t num_begun_ = 0;
  uint64_t last_ended_ = 0;
  uint64_t last_overdue_ = 0;
  std::vector<Counter> counters_;
  Spans spans_;
  std::deque<Watched> watched_;
  std::string failure_;
};

struct HookSettings {
  bool is_timed = true;  // spans and host times are taken
  // Ranks compare every collective in the store before they start it; at first what
  // TORCH_MOE_EP_CHECK says.
  bool is_checked = false;
};
TORCH_MOE_EP_API HookSettings& hook_settings();

}  // namespace torch_moe_ep::comm
