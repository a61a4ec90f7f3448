#include "comm/termination.h"

#include <c10/util/Logging.h>
#include <c10/util/thread_name.h>
#include <semaphore.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "comm/failure.h"

namespace torch_moe_ep::comm {
namespace {

using Clock = std::chrono::steady_clock;

struct Wait {
  const char* operation;
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  c10::DeviceType device_type;
  Clock::time_point start;
};

// All that the signal handler touches; never freed, since the signal may come late.
struct State {
  std::atomic<int> num_waits{0};
  std::atomic<bool> is_reporting{false};
  struct sigaction previous{};
  pid_t process = 0;
  sem_t signalled{};
  std::mutex mutex;
  std::map<const void*, Wait> waits;
};

State& state() {
  static auto* state = new State();
  return *state;
}

bool is_default(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) == 0 && action.sa_handler == SIG_DFL;
}

void call(const struct sigaction& action, int signal, siginfo_t* info, void* context) {
  if ((action.sa_flags & SA_SIGINFO) != 0) {
    action.sa_sigaction(signal, info, context);
  } else if (action.sa_handler != SIG_IGN) {
    action.sa_handler(signal);
  }
}

// Lets the signal end the process as if this handler had never been there.
void end_by(int signal) {
  sigaction(signal, &state().previous, nullptr);
  kill(getpid(), signal);
}

// Async-signal-safe: atomics, sem_post, sigaction, kill, getpid.
void on_signal(int signal, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  State& shared = state();
  const bool is_default_action = is_default(shared.previous);
  if (getpid() == shared.process && shared.num_waits > 0) {
    // The reporting thread ends the process; a second signal while it reports changes nothing.
    if (!shared.is_reporting.exchange(true)) sem_post(&shared.signalled);
  } else if (is_default_action) {
    end_by(signal);
  }
  if (!is_default_action) call(shared.previous, signal, info, context);
  errno = saved_errno;
}

std::optional<Wait> oldest_wait() {
  State& shared = state();
  const std::scoped_lock lock(shared.mutex);
  std::optional<Wait> oldest;
  for (const auto& [key, wait] : shared.waits) {
    if (!oldest.has_value() || wait.start < oldest->start) oldest = wait;
  }
  return oldest;
}

void report() {
  const auto wait = oldest_wait();
  if (!wait.has_value()) return;
  const std::chrono::duration<double> waited = Clock::now() - wait->start;
  const std::string reason = "SIGTERM, after waiting for " + std::to_string(waited.count()) + " s";
  LOG(ERROR) << describe_failure_beside(wait->operation, *wait->group, wait->device_type, reason);
}

void report_when_signalled() {
  c10::setThreadName("moe_ep_sigterm");
  State& shared = state();
  for (;;) {
    while (sem_wait(&shared.signalled) != 0) {
    }
    try {
      report();
    } catch (const std::exception& error) {
      LOG(ERROR) << "torch_moe_ep: SIGTERM during an exchange: " << error.what();
    }
    if (is_default(shared.previous)) end_by(SIGTERM);
    shared.is_reporting = false;
  }
}

void install() {
  State& shared = state();
  shared.process = getpid();
  sem_init(&shared.signalled, 0, 0);
  std::thread(report_when_signalled).detach();
  struct sigaction ours{};
  ours.sa_sigaction = on_signal;
  ours.sa_flags = SA_SIGINFO | SA_RESTART;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGTERM, nullptr, &shared.previous);
  sigaction(SIGTERM, &ours, nullptr);
}

}  // namespace

Waiting::Waiting(const char* operation,
                 c10::intrusive_ptr<c10d::ProcessGroup> group,
                 c10::DeviceType device_type)
    : key_(this) {
  static std::once_flag once;
  std::call_once(once, install);
  State& shared = state();
  const std::scoped_lock lock(shared.mutex);
  shared.waits.emplace(key_, Wait{operation, std::move(group), device_type, Clock::now()});
  ++shared.num_waits;
}

Waiting::~Waiting() {
  State& shared = state();
  const std::scoped_lock lock(shared.mutex);
  --shared.num_waits;
  shared.waits.erase(key_);
}

}  // namespace torch_moe_ep::comm
