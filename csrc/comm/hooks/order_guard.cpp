#include "comm/hooks/order_guard.h"

#include <c10/util/Exception.h>
#include <c10/util/Logging.h>
#include <c10/util/hash.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <chrono>
#include <functional>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "comm/hooks/watcher.h"
#include "comm/timeout.h"

namespace torch_moe_ep::comm {
namespace {

// Departures of all ranks together after which a kind of step is left alone.
constexpr int kMaxLearned = 64;
constexpr std::chrono::milliseconds kBetweenLooks(20);
constexpr std::chrono::milliseconds kGrace(10000);  // what rank 0 may take over its verdict
constexpr const char* kKeys = "torch_moe_ep/hooks/order/";

// Forwards of this thread that have begun and not ended.
thread_local int num_open_forwards = 0;

bool is_in_window() {
  return num_open_forwards > 0 || torch::autograd::get_current_graph_task_id() != -1;
}

// Sizes count where they do not change from step to step: FSDP's gathers and scatters.
bool has_fixed_size(const Call& call) {
  const std::string_view operation = call.operation;
  return call.label.stage == nullptr &&
         (operation == "all-gather" || operation == "reduce-scatter");
}

uint64_t print_of(const Call& call, const std::string& group, int size) {
  return c10::get_hash(
      call.fingerprint(), group, size, has_fixed_size(call) ? call.sent_bytes : int64_t{-1});
}

std::string text_of(const Call& call, const std::string& group, int size) {
  std::ostringstream text;
  text << call.operation;
  if (call.dtype.has_value()) text << " of " << c10::toString(*call.dtype);
  if (has_fixed_size(call)) text << ", " << call.sent_bytes << " bytes";
  text << ", on group " << group << " of " << size << " ranks";
  const std::string layer = layer_name(call.label.layer);
  if (!layer.empty()) text << "; layer " << layer;
  if (call.label.stage != nullptr) text << "; stage " << call.label.stage;
  return text.str();
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  std::string line;
  while (std::getline(stream, line)) lines.push_back(line);
  return lines;
}

// Where two first steps part. The first line is the kind of step.
std::string first_difference(const std::string& here, const std::string& there) {
  const auto mine = lines_of(here);
  const auto theirs = lines_of(there);
  size_t place = 0;
  while (place < mine.size() && place < theirs.size() && mine[place] == theirs[place]) ++place;
  const auto at = [&](const std::vector<std::string>& lines) {
    return place < lines.size() ? lines[place] : std::string("nothing");
  };
  return (place == 0 ? "the kind of step" : "collective " + std::to_string(place)) + ": " +
         at(mine) + " and " + at(theirs);
}

std::string joined(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += (text.empty() ? "" : ", ") + std::to_string(rank);
  return text;
}

}  // namespace

OrderGuard& OrderGuard::get() {
  static auto* guard = new OrderGuard();
  return *guard;
}

void OrderGuard::start(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size) {
  const std::lock_guard<std::mutex> lock(mutex_);
  store_ = store;
  mailbox_ = mailbox_of(store);
  rank_ = rank;
  size_ = size;
  forward_ = 0;
  kinds_.clear();
  steps_.clear();
  is_on_ = true;
}

void OrderGuard::stop() {
  is_on_ = false;
  const std::lock_guard<std::mutex> lock(mutex_);
  store_.reset();
  mailbox_.reset();
  kinds_.clear();
  steps_.clear();
}

void OrderGuard::begin_forward(const std::string& kind, bool is_inside_backward) {
  const bool is_outermost = num_open_forwards == 0 || is_inside_backward;
  if (is_on_ && is_outermost) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!is_inside_backward) {
      compare_first_step();
      steps_.clear();
    }
    begin_step(kind);
  }
  ++num_open_forwards;
}

void OrderGuard::begin_step(const std::string& kind) {
  Step step;
  step.kind = kind;
  step.forward = ++forward_;
  step.at = &kinds_[kind].root;
  step.texts = kind + "\n";
  place_ = 0;
  steps_.push_back(std::move(step));
}

void OrderGuard::end_forward() {
  --num_open_forwards;
  if (!is_on_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (num_open_forwards > 0 || steps_.size() < 2) return;
  compare_first_step();
  steps_.pop_back();
  place_ = steps_.back().place;
}

void OrderGuard::note(const Call& call, const std::string& group, int size) {
  if (!is_on_ || !is_in_window()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (steps_.empty()) return;
  Step& step = steps_.back();
  Kind& kind = kinds_[step.kind];
  if (kind.is_given_up) return;
  const uint64_t print = print_of(call, group, size);
  auto found = step.at->next.find(print);
  if (found == step.at->next.end()) {
    const std::string text = text_of(call, group, size);
    if (kind.is_shared) depart(kind, step, print, text);
    if (kind.is_given_up) return;
    auto node = std::make_unique<Node>();
    node->text = text;
    found = step.at->next.emplace(print, std::move(node)).first;
  }
  if (!kind.is_shared) step.texts += found->second->text + "\n";
  step.at = found->second.get();
  place_ = ++step.place;
}

std::string OrderGuard::position() const {
  return is_on_ ? std::to_string(forward_) + " " + std::to_string(place_) : "";
}

// Collective over all ranks through the store, on the host alone. Called with the lock held.
void OrderGuard::compare_first_step() {
  if (steps_.empty()) return;
  Step& step = steps_.back();
  Kind& kind = kinds_[step.kind];
  if (std::exchange(kind.is_shared, true) || size_ == 1) return;
  const std::string key = kKeys + std::to_string(step.forward) + "/";
  store_->set(key + std::to_string(rank_), step.texts);
  store_->set(key + "print/" + std::to_string(rank_),
              std::to_string(std::hash<std::string>()(step.texts)));
  step.texts.clear();
  std::string verdict;
  if (rank_ == 0) {
    verdict = verdict_on_first_step(key);
    store_->set(key + "verdict", verdict.empty() ? std::string("-") : verdict);
  } else {
    store_->wait({key + "verdict"}, timeout_of(kBackendDefaultTimeout) + kGrace);
    verdict = store_->get_to_str(key + "verdict");
    if (verdict == "-") verdict.clear();
  }
  store_->deleteKey(key + std::to_string(rank_));
  TORCH_CHECK(verdict.empty(), verdict);
}

// On rank 0: "" when all ranks did the same, else who differs from the most common order and where.
std::string OrderGuard::verdict_on_first_step(const std::string& key) {
  std::map<std::string, std::vector<int>> ranks_of_print;
  for (int rank = 0; rank < size_; ++rank) {
    const std::string print_key = key + "print/" + std::to_string(rank);
    try {
      store_->wait({print_key}, timeout_of(kBackendDefaultTimeout));
    } catch (const std::exception&) {
      return "torch_moe_ep: global rank " + std::to_string(rank) +
             " did not come to the end of its first step of this kind (dead, stuck, or in another "
             "kind of step)";
    }
    ranks_of_print[store_->get_to_str(print_key)].push_back(rank);
  }
  if (ranks_of_print.size() == 1) return "";
  const std::vector<int>* usual = nullptr;
  for (const auto& [print, ranks] : ranks_of_print) {
    const bool is_first = usual != nullptr && ranks.size() == usual->size() && ranks[0] == 0;
    if (usual == nullptr || ranks.size() > usual->size() || is_first) usual = &ranks;
  }
  for (const auto& [print, ranks] : ranks_of_print) {
    if (&ranks == usual) continue;
    const auto text = [&](int rank) { return store_->get_to_str(key + std::to_string(rank)); };
    return "torch_moe_ep: the ranks issue their collectives in different orders; global ranks " +
           joined(ranks) + " depart from ranks " + joined(*usual) + " in " +
           first_difference(text(ranks[0]), text((*usual)[0]));
  }
  return "";
}

// Returns when every rank departs alike; raises when another goes on as recorded.
void OrderGuard::depart(Kind& kind, Step& step, uint64_t print, const std::string& text) {
  const std::string key = std::string(kKeys) + "departure/" + std::to_string(step.forward) + "/" +
                          std::to_string(step.place) + "/" + std::to_string(print);
  store_->add(key, 1);
  const auto deadline = Clock::now() + timeout_of(kBackendDefaultTimeout);
  std::vector<int> ahead;
  while (store_->add(key, 0) < size_) {
    if (!ahead.empty() || Clock::now() > deadline) {
      std::string expected;
      for (const auto& [other, node] : step.at->next) {
        expected += (expected.empty() ? "" : ", or ") + node->text;
      }
      TORCH_CHECK(false,
                  "torch_moe_ep: global rank ",
                  rank_,
                  " departs from the order of its collectives in a step of ",
                  step.kind,
                  " (forward ",
                  step.forward,
                  ", collective ",
                  step.place + 1,
                  "): expected ",
                  expected.empty() ? "none" : expected,
                  "; came ",
                  text,
                  ahead.empty() ? "; the other ranks have not come here"
                                : "; global ranks " + joined(ahead) + " went on as recorded");
    }
    std::this_thread::sleep_for(kBetweenLooks);
    if (store_->add(key, 0) < size_) ahead = ranks_ahead(step);
  }
  if (++kind.num_learned < kMaxLearned) return;
  kind.is_given_up = true;
  LOG(WARNING) << "torch_moe_ep: the order of collectives in " << step.kind
               << " changes from step to step on all ranks alike; it is no longer looked at";
}

std::vector<int> OrderGuard::ranks_ahead(const Step& step) {
  const int64_t alarm = mailbox_->raise_alarm(kOrderTopic);
  std::vector<int> others;
  for (int rank = 0; rank < size_; ++rank) {
    if (rank != rank_) others.push_back(rank);
  }
  std::vector<int> ahead;
  for (const auto& [rank, text] : mailbox_->statements(kOrderTopic, alarm, others)) {
    int64_t forward = 0;
    int64_t place = 0;
    std::istringstream(text) >> forward >> place;
    if (std::pair(forward, place) > std::pair(step.forward, step.place)) ahead.push_back(rank);
  }
  return ahead;
}

}  // namespace torch_moe_ep::comm
