// One thread a process that answers other ranks' alarms and looks for calls that are overdue.
//
// It runs while a group with hooks lives. Once in kLookEvery it asks the job's store for one key,
// and the device for the oldest call of each group; it launches nothing and holds no Python lock.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

#include "comm/hooks/ledger.h"
#include "comm/hooks/mailbox.h"

namespace torch_moe_ep::comm {

constexpr std::chrono::milliseconds kLookEvery(500);

// The mailbox of the job whose store this is, or is a part of.
std::shared_ptr<Mailbox> mailbox_of(const c10::intrusive_ptr<c10d::Store>& store);

// Watches a ledger until it is forgotten. `timeout` is asked for at every look: calls older than
// that are overdue; zero: the backend finds those itself.
void watch_ledger(const std::shared_ptr<Ledger>& ledger,
                  std::function<std::chrono::milliseconds()> timeout);
void forget_ledger(const Ledger* ledger);

}  // namespace torch_moe_ep::comm
