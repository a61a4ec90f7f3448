#include "comm/hooks/watcher.h"

#include <c10/util/Logging.h>
#include <c10/util/thread_name.h>

#include <algorithm>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/hooks/order_guard.h"
#include "comm/hooks/report.h"

namespace torch_moe_ep::comm {
namespace {

struct Watched {
  std::shared_ptr<Ledger> ledger;
  std::shared_ptr<Mailbox> mailbox;
  std::function<std::chrono::milliseconds()> timeout;
};

void answer(Mailbox& mailbox, const std::vector<Watched>& all) {
  for (const auto& [alarm, group_name] : mailbox.new_alarms()) {
    const std::string position = OrderGuard::get().position();
    if (group_name == kOrderTopic && !position.empty()) {
      mailbox.state(group_name, alarm, OrderGuard::get().rank(), position);
    }
    for (const Watched& watched : all) {
      const Place place = watched.ledger->place();
      if (watched.mailbox.get() != &mailbox || place.group_name != group_name) continue;
      mailbox.state(group_name, alarm, place.rank, watched.ledger->statement());
    }
  }
}

// The message goes to the log at once, since the rank may be waiting for its device, and is raised
// by the next call on the group.
void look_for_overdue(const Watched& watched, const std::vector<Watched>& all) {
  const auto timeout = watched.timeout();
  if (timeout <= std::chrono::milliseconds::zero()) return;
  const auto call = watched.ledger->overdue(timeout);
  if (!call.has_value()) return;
  const std::string message =
      explain(*watched.ledger,
              *call,
              "nothing within " + std::to_string(timeout.count() / 1000.0) + " s",
              [&] { answer(*watched.mailbox, all); });
  LOG(ERROR) << message;
  watched.ledger->fail(message);
}

class Watcher {
 public:
  static Watcher& get() {
    static auto* watcher = new Watcher();  // never freed: its thread may outlive static objects
    return *watcher;
  }

  std::shared_ptr<Mailbox> mailbox_of(const c10::intrusive_ptr<c10d::Store>& group_store) {
    const auto store = base_store(group_store);
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<Mailbox> mailbox = mailboxes_[store.get()].lock();
    if (mailbox == nullptr) {
      mailbox = std::make_shared<Mailbox>(store);
      mailboxes_[store.get()] = mailbox;
    }
    return mailbox;
  }

  void add(Watched watched) {
    const std::lock_guard<std::mutex> lock(mutex_);
    all_.push_back(std::move(watched));
    if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
  }

  void remove(const Ledger* ledger) {
    std::thread ending;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto is_of = [&](const Watched& watched) { return watched.ledger.get() == ledger; };
      all_.erase(std::remove_if(all_.begin(), all_.end(), is_of), all_.end());
      if (all_.empty()) ending = std::move(thread_);
    }
    if (!ending.joinable()) return;
    changed_.notify_all();
    ending.join();
  }

 private:
  void run() {
    c10::setThreadName("moe_ep_hooks");
    const auto self = std::this_thread::get_id();
    std::unique_lock<std::mutex> lock(mutex_);
    while (thread_.get_id() == self) {
      const std::vector<Watched> all = all_;
      lock.unlock();
      look(all);
      lock.lock();
      changed_.wait_for(lock, kLookEvery, [&] { return thread_.get_id() != self; });
    }
  }

  // A store that does not answer is another's report: the call that failed with it.
  static void look(const std::vector<Watched>& all) {
    std::vector<Mailbox*> looked;
    for (const Watched& watched : all) {
      try {
        if (std::find(looked.begin(), looked.end(), watched.mailbox.get()) == looked.end()) {
          looked.push_back(watched.mailbox.get());
          answer(*watched.mailbox, all);
        }
        look_for_overdue(watched, all);
      } catch (const std::exception& error) {
        LOG(INFO) << "torch_moe_ep: the hooks cannot look for other ranks: " << error.what();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Watched> all_;
  std::map<const c10d::Store*, std::weak_ptr<Mailbox>> mailboxes_;
  std::thread thread_;
};

}  // namespace

std::shared_ptr<Mailbox> mailbox_of(const c10::intrusive_ptr<c10d::Store>& store) {
  return Watcher::get().mailbox_of(store);
}

void watch_ledger(const std::shared_ptr<Ledger>& ledger,
                  std::function<std::chrono::milliseconds()> timeout) {
  Watcher::get().add({ledger, mailbox_of(ledger->place().store), std::move(timeout)});
}

void forget_ledger(const Ledger* ledger) { Watcher::get().remove(ledger); }

}  // namespace torch_moe_ep::comm
