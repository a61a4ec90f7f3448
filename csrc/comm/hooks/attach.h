// Hooks around the backends of process groups, and what they counted.
#pragma once

#include <c10/core/DeviceType.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <optional>
#include <string>
#include <vector>

#include "comm/hooks/ledger.h"
#include "common/visibility.h"

namespace torch_moe_ep::comm {

// Puts hooks around every backend of a group, under the same device and kind of backend; a second
// time does nothing. Local. `global_ranks`: the members in the order of the group's ranks, empty
// for all ranks.
TORCH_MOE_EP_API void attach_hooks(const c10::intrusive_ptr<c10d::ProcessGroup>& group,
                                   const std::vector<uint64_t>& global_ranks);
// The backends as they were; their counts are gone. Works in flight keep their hooks. Local.
TORCH_MOE_EP_API void detach_hooks(const c10::intrusive_ptr<c10d::ProcessGroup>& group);
TORCH_MOE_EP_API bool has_hooks(const c10::intrusive_ptr<c10d::ProcessGroup>& group);

// Counts of one group, or of every hooked group that lives (nullptr), by group and stage.
TORCH_MOE_EP_API std::vector<StageCount> stage_counts(
    const c10::intrusive_ptr<c10d::ProcessGroup>& group);
TORCH_MOE_EP_API void reset_stage_counts();
// Reads the GPU times that have come in; waits for none.
TORCH_MOE_EP_API void read_times();

// What the hooks of a group say about its last call; nothing when it has none.
std::optional<std::string> explain_by_hooks(c10d::ProcessGroup& group,
                                            c10::DeviceType device_type,
                                            const std::string& backend_message);

}  // namespace torch_moe_ep::comm
