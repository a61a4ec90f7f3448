// A device on the host, for kernels whose instructions are replaced by the headers beside this one.
//
// Threads are fibers that a seeded scheduler interleaves at random; some warps are slow. Loads,
// products and stores happen some time after they were issued. Shared memory holds no data: whoever
// multiplies in a stage sees which box of which operand lies there. A state in which nobody can go
// on ends the program.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __CUDA_ARCH_FEAT_SM90_ALL

namespace device {

constexpr int kThreads = 384, kWarp = 32, kGroup = 128, kStackBytes = 1 << 16;

[[noreturn]] inline void fail(const char* what, int a = 0, int b = 0, int c = 0) {
  std::printf("%s (%d, %d, %d)\n", what, a, b, c);
  std::fflush(stdout);
  std::_Exit(1);
}

// A box of rows of 128 bytes in shared memory: which operand, and from where.
struct Box {
  char operand;
  int rows, x0, x1, x2;

  bool operator==(const Box&) const = default;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int cta, thread;
  bool is_done = false;
  std::function<bool()> is_ready = [] { return true; };
  std::map<uint32_t, Box> seen;  // by address
};

inline std::mt19937 random_source;
inline std::vector<Fiber> fibers;
inline std::vector<std::function<void()>> events;   // what happens some time, in any order
inline std::vector<std::function<bool()>> engines;  // each does one step of work that is in order
inline std::vector<bool> slow_warps;
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline int cluster_size = 1;
inline int num_ctas = 1;

inline int draw(int bound) { return static_cast<int>(random_source() % bound); }

inline void block_until(std::function<bool()> is_ready) {
  current->is_ready = std::move(is_ready);
  swapcontext(&current->context, &scheduler);
}

inline int first_cta_of_cluster() { return current->cta / cluster_size * cluster_size; }

inline bool run_event() {
  if (events.empty()) return false;
  const int chosen = draw(static_cast<int>(events.size()));
  const auto event = std::move(events[chosen]);
  events[chosen] = std::move(events.back());
  events.pop_back();
  event();
  return true;
}

inline bool resume(Fiber& fiber) {
  if (fiber.is_done || !fiber.is_ready()) return false;
  current = &fiber;
  swapcontext(&scheduler, &fiber.context);
  return true;
}

inline std::function<void()> kernel;

inline void enter_kernel() {
  kernel();
  current->is_done = true;
  swapcontext(&current->context, &scheduler);
}

inline void make_fibers() {
  fibers.resize(num_ctas * kThreads);
  slow_warps.resize(fibers.size() / kWarp);
  for (auto&& is_slow : slow_warps) is_slow = draw(8) == 0;
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.cta = static_cast<int>(i) / kThreads;
    fiber.thread = static_cast<int>(i) % kThreads;
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, enter_kernel, 0);
  }
}

// Everybody and everything is tried once. False: all is done.
inline bool sweep() {
  bool is_stuck = !run_event(), is_over = true;
  for (auto& engine : engines) is_stuck &= !engine();
  for (Fiber& fiber : fibers) {
    is_over &= fiber.is_done;
    is_stuck &= !resume(fiber);
  }
  if (is_stuck && !is_over) fail("nobody can go on");
  return !is_over;
}

// Runs a kernel on num_ctas CTAs; returns when all of its threads have ended.
inline void run(std::function<void()> body) {
  kernel = std::move(body);
  make_fibers();
  const int event_rate = 1 << draw(15), engine_rate = 1 << draw(8);
  for (int failures = 0;;) {
    bool went_on = draw(event_rate) == 0 && run_event();
    if (!engines.empty() && draw(engine_rate) == 0) {
      went_on |= engines[draw(static_cast<int>(engines.size()))]();
    }
    const int chosen = draw(static_cast<int>(fibers.size()));
    if (!slow_warps[chosen / kWarp] || draw(256) == 0) went_on |= resume(fibers[chosen]);
    failures = went_on ? 0 : failures + 1;
    if (failures < 500) continue;
    if (!sweep()) return;
    failures = 0;
  }
}

// Where `expected` threads meet.
struct Meeting {
  int arrived = 0, generation = 0;

  void arrive(int expected) {
    if (++arrived < expected) return;
    arrived = 0;
    ++generation;
  }
  void sync(int expected) {
    const int mine = generation;
    arrive(expected);
    block_until([this, mine] { return generation != mine; });
  }
};

// Keyed by CTA, warp, group or barrier; nodes stay where they are.
template <class Value>
Value& of(int64_t key) {
  static std::map<int64_t, Value> values;
  return values[key];
}

struct Warp {
  Meeting meeting;
  int values[2][kWarp];
};

template <class Read>
auto exchange(int value, Read read) {
  Warp& warp = of<Warp>((current - fibers.data()) / kWarp);
  int* values = warp.values[warp.meeting.generation % 2];
  values[current->thread % kWarp] = value;
  warp.meeting.sync(kWarp);
  return read(values);
}

// ---- mbarriers; addresses carry the CTA above their lowest 24 bits ----

struct Barrier {
  int arrivals = 0, pending = 0, bytes = 0;
  unsigned phase = 0;

  void settle() {
    if (pending < 0) fail("more arrivals than the barrier expects");
    if (pending > 0 || bytes != 0) return;
    pending = arrivals;
    ++phase;
  }
};

inline Barrier& barrier(uint32_t address) { return of<Barrier>(address); }

inline void arrive(uint32_t address) {
  --barrier(address).pending;
  barrier(address).settle();
}
inline void complete_bytes(uint32_t address, int bytes) {
  barrier(address).bytes -= bytes;
  barrier(address).settle();
}

// ---- shared memory ----

using Memory = std::map<uint32_t, Box>;  // by address in the CTA

// Lands in each CTA of the cluster that the mask names, at a time of its own.
inline void load_box(
    uint32_t address, char operand, int rows, uint32_t full, int x0, int x1, int x2, int mask) {
  for (int rank = 0; rank < cluster_size; ++rank) {
    if ((mask >> rank & 1) == 0) continue;
    const int cta = first_cta_of_cluster() + rank;
    events.push_back([=] {
      of<Memory>(cta)[address & 0xffffff] = {operand, rows, x0, x1, x2};
      complete_bytes(uint32_t(cta) << 24 | (full & 0xffffff), rows * 128);
    });
  }
}

// ---- stores of one thread, in bulk groups; the last group is still open ----

struct Bulk {
  std::deque<int> num_unread = {0};
};

inline Bulk& bulk_of_current() { return of<Bulk>(current - fibers.data()); }

// ---- products of a consumer group, in order, each once all of its threads have issued it ----

struct Operand {
  char operand;
  int mn, k, expert;

  bool operator==(const Operand&) const = default;
};

struct Product {
  Operand a, b;
  bool accumulates;
};

struct Group {
  std::vector<std::function<Product()>> issued;
  std::vector<int> issued_by = std::vector<int>(kGroup);
  std::vector<std::vector<int>> committed = std::vector<std::vector<int>>(kGroup);
  int num_executed = 0;
  std::vector<Product> log;  // of the tile at hand

  bool execute_one() {
    if (num_executed == *std::min_element(issued_by.begin(), issued_by.end())) return false;
    log.push_back(issued[num_executed++]());
    return true;
  }
};

inline Group& group_of_current() { return of<Group>(current->cta * 3 + current->thread / kGroup); }

}  // namespace device

struct Index {
  unsigned x;
};
#define threadIdx (Index{unsigned(device::current->thread)})
#define blockIdx (Index{unsigned(device::current->cta)})
#define gridDim (Index{unsigned(device::num_ctas)})
using std::min;

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint64_t{a} * b) >> 32; }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int atomicAdd(int* target, int value) {
  const int before = *target;
  *target += value;
  return before;
}
inline void __syncthreads() {
  device::of<device::Meeting>(device::current->cta * 100).sync(device::kThreads);
}
inline void __syncwarp() {
  device::exchange(0, [](int*) { return 0; });
}
inline int __shfl_up_sync(uint32_t, int value, int delta) {
  const int lane = device::current->thread % 32;
  return device::exchange(value, [=](int* v) { return lane < delta ? value : v[lane - delta]; });
}
inline float __shfl_xor_sync(uint32_t, float, int) { return 0; }  // of values, which do not matter
inline int __shfl_sync(uint32_t, int value, int lane) {
  return device::exchange(value, [=](int* v) { return v[lane]; });
}
inline uint32_t __ballot_sync(uint32_t, bool is_set) {
  return device::exchange(is_set, [](int* v) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= uint32_t(v[lane] != 0) << lane;
    return bits;
  });
}
