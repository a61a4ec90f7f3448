// Every ledger of this process that lives.
#pragma once

#include <memory>
#include <vector>

#include "comm/hooks/ledger.h"

namespace torch_moe_ep::comm {

void register_ledger(const std::shared_ptr<Ledger>& ledger);
void unregister_ledger(const Ledger* ledger);
std::vector<std::shared_ptr<Ledger>> live_ledgers();

}  // namespace torch_moe_ep::comm
