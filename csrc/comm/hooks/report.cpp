#include "comm/hooks/report.h"

#include <c10/util/Exception.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "comm/failure.h"
#include "comm/hooks/mailbox.h"
#include "comm/hooks/watcher.h"

namespace torch_moe_ep::comm {
namespace {

struct Statement {
  uint64_t num_begun = 0;
  uint64_t last_ended = 0;
  std::vector<ReadCall> recent;
};

Statement parse(const std::string& text) {
  std::istringstream stream(text);
  Statement statement;
  std::string line;
  std::getline(stream, line);
  std::istringstream(line) >> statement.num_begun >> statement.last_ended;
  while (std::getline(stream, line)) statement.recent.push_back(from_line(line));
  return statement;
}

std::string rank_name(const Place& place, int rank) {
  return "rank " + std::to_string(place.global_rank(rank));
}

std::string other_size(const char* what, int64_t expected, int64_t seen) {
  return expected == seen ? ""
                          : std::string(what) + " " + std::to_string(seen) + " bytes where " +
                                std::to_string(expected) + " are expected";
}

// Sizes that must be equal on every rank, by operation; all-to-all by pairs of ranks.
std::string size_difference(const Place& place,
                            const ReadCall& mine,
                            int other_rank,
                            const ReadCall& theirs) {
  const auto split = [](const std::vector<int64_t>& bytes, int64_t total, size_t size, int rank) {
    return bytes.empty() ? total / static_cast<int64_t>(size) : bytes.at(rank);
  };
  if (mine.operation == "all-to-all") {
    const size_t size = place.size;
    const std::string sent =
        other_size("sends this rank",
                   split(mine.received_from, mine.received_bytes, size, other_rank),
                   split(theirs.sent_to, theirs.sent_bytes, size, place.rank));
    return !sent.empty()
               ? sent
               : other_size("has room for",
                            split(mine.sent_to, mine.sent_bytes, size, other_rank),
                            split(theirs.received_from, theirs.received_bytes, size, place.rank));
  }
  if (mine.operation == "scatter") {
    return other_size("receives", mine.received_bytes, theirs.received_bytes);
  }
  return other_size("sends", mine.sent_bytes, theirs.sent_bytes);
}

std::string absence(const Place& place, int rank, const Statement& statement) {
  std::string text = rank_name(place, rank);
  if (statement.recent.empty()) return text + " has not begun any collective of this group";
  const ReadCall& last = statement.recent.back();
  text += " has not come to it: its last one is " + last.describe();
  return text + (last.number <= statement.last_ended ? ", which it has done" : ", where it waits");
}

// Sentences on every other rank, and the list of those that took no part.
std::string findings(const Place& place,
                     const ReadCall& mine,
                     const std::vector<int>& others,
                     const std::map<int, std::string>& said) {
  std::string absent;
  std::string sentences;
  for (const int rank : others) {
    const auto statement = said.find(rank);
    const std::string sentence =
        statement == said.end()
            ? rank_name(place, rank) + " gives no answer (dead, or without hooks)"
            : contradiction(place, mine, rank, statement->second);
    if (sentence.empty()) continue;
    sentences += "; " + sentence;
    if (statement == said.end() || parse(statement->second).num_begun < mine.number) {
      absent += (absent.empty() ? "" : ", ") + std::to_string(place.global_rank(rank));
    }
  }
  if (sentences.empty()) return "; every other rank is in it with sizes that fit";
  if (absent.empty()) return sentences;
  return "; global ranks that did not take part: " + absent + " (dead, stuck elsewhere or late)" +
         sentences;
}

std::string failure_of(const Place& place, const ReadCall& call) {
  return "torch_moe_ep: collective " + call.describe() + " of group " +
         (place.description.empty() ? place.group_name : place.description) +
         " failed on global rank " + std::to_string(place.global_rank(place.rank));
}

}  // namespace

std::string contradiction(const Place& place,
                          const ReadCall& mine,
                          int other_rank,
                          const std::string& statement) {
  const Statement read = parse(statement);
  if (read.num_begun < mine.number) return absence(place, other_rank, read);
  for (const ReadCall& theirs : read.recent) {
    if (theirs.number != mine.number) continue;
    if (theirs.operation != mine.operation || theirs.dtype != mine.dtype ||
        theirs.layer != mine.layer || theirs.stage != mine.stage) {
      return rank_name(place, other_rank) + " has " + theirs.describe() + " in its place";
    }
    const std::string difference = size_difference(place, mine, other_rank, theirs);
    return difference.empty() ? "" : rank_name(place, other_rank) + " " + difference;
  }
  return "";  // further on than it remembers: it took part
}

void compare_before_start(const Ledger& ledger,
                          const Call& call,
                          std::chrono::milliseconds timeout) {
  const Place place = ledger.place();
  const auto key = [&](uint64_t number, int rank) {
    return "torch_moe_ep/hooks/check/" + place.group_name + "/" + std::to_string(number) + "/" +
           std::to_string(rank);
  };
  const ReadCall mine = read(call);
  place.store->set(key(call.number, place.rank), ledger.statement());
  std::string sentences;
  for (int rank = 0; rank < place.size; ++rank) {
    if (rank == place.rank) continue;
    try {
      place.store->wait({key(call.number, rank)}, timeout);
    } catch (const std::exception&) {
      TORCH_CHECK(false, explain(ledger, call, "it was not started"));
    }
    const std::string sentence =
        contradiction(place, mine, rank, place.store->get_to_str(key(call.number, rank)));
    if (!sentence.empty()) sentences += "; " + sentence;
  }
  // Whoever came here has read what was said of the call before.
  if (call.number > 1) place.store->deleteKey(key(call.number - 1, place.rank));
  TORCH_CHECK(sentences.empty(), failure_of(place, mine), sentences, ". It was not started.");
}

std::string explain(const Ledger& ledger,
                    const Call& call,
                    const std::string& backend_message,
                    const std::function<void()>& meanwhile) {
  const Place place = ledger.place();
  const ReadCall mine = read(call);
  std::string others_say;
  try {
    const auto mailbox = mailbox_of(place.store);
    const int64_t alarm = mailbox->raise_alarm(place.group_name);
    mailbox->state(place.group_name, alarm, place.rank, ledger.statement());
    std::vector<int> others;
    for (int rank = 0; rank < place.size; ++rank) {
      if (rank != place.rank) others.push_back(rank);
    }
    const auto said = mailbox->statements(place.group_name, alarm, others, meanwhile);
    others_say = findings(place, mine, others, said);
  } catch (const std::exception&) {
    others_say = "; " + describe_store(place.store);
  }
  return failure_of(place, mine) + others_say + ". The backend said: " + backend_message;
}

}  // namespace torch_moe_ep::comm
