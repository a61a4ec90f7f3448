// Who is at fault when a call fails or is overdue, by what the ranks say of their calls.
#pragma once

#include <chrono>
#include <functional>
#include <string>

#include "comm/hooks/ledger.h"

namespace torch_moe_ep::comm {

// "torch_moe_ep: collective #7 (...) of group mesh_ep failed on global rank 0; <the others>. The
// backend said: ..." Raises an alarm in the job's store and waits up to three seconds for the
// other ranks' statements; names every rank that gave none, has not come to the call, is in another
// one, or has other sizes, with its layer and stage. Throws nothing. `meanwhile`: as in Mailbox.
std::string explain(const Ledger& ledger,
                    const Call& call,
                    const std::string& backend_message,
                    const std::function<void()>& meanwhile = nullptr);

// Raises on every rank of the group when ranks are about to start different calls, or the same with
// sizes that do not fit, or when one does not come within the time-out. Collective through the
// group's store, on the host alone; call it before each numbered call.
void compare_before_start(const Ledger& ledger,
                          const Call& call,
                          std::chrono::milliseconds timeout);

// What another rank's statement says against a call; "" when they agree. For tests and explain.
std::string contradiction(const Place& place,
                          const ReadCall& mine,
                          int other_rank,
                          const std::string& statement);

}  // namespace torch_moe_ep::comm
