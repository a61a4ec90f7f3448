#include "comm/hooks/hooked_work.h"

#include <c10/util/Exception.h>

#include <memory>
#include <string>
#include <utility>

#include "comm/hooks/report.h"

namespace torch_moe_ep::comm {

HookedWork::HookedWork(c10::intrusive_ptr<c10d::Work> inner,
                       std::shared_ptr<Ledger> ledger,
                       Ticket ticket)
    : c10d::Work(/*rank=*/-1, inner->retrieveOpType()),
      inner_(std::move(inner)),
      ledger_(std::move(ledger)),
      ticket_(std::move(ticket)) {}

HookedWork::~HookedWork() {
  // Nobody waited (a future did, or nobody cares): counted, without a time.
  if (!has_ended_.exchange(true)) ledger_->end(ticket_, /*is_timed=*/false);
}

void HookedWork::synchronize() {
  inner_->synchronize();
  end();
}

bool HookedWork::wait(std::chrono::milliseconds timeout) {
  std::string message;
  try {
    const bool is_done = inner_->wait(timeout);
    end();
    return is_done;
  } catch (const c10::Error& error) {
    message = error.what_without_backtrace();
  } catch (const std::exception& error) {
    message = error.what();
  }
  fail(message);
}

void HookedWork::blockCurrentStream() {
  inner_->blockCurrentStream();
  end();
}

void HookedWork::end() {
  if (!has_ended_.exchange(true)) ledger_->end(ticket_, /*is_timed=*/true);
}

void HookedWork::fail(const std::string& backend_message) const {
  const auto call = ledger_->call_of(ticket_.number);
  TORCH_CHECK(call.has_value(), backend_message);
  TORCH_CHECK(false, explain(*ledger_, *call, backend_message));
}

}  // namespace torch_moe_ep::comm
