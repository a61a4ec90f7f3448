// Who is at fault when a collective fails or times out.
#pragma once

#include <c10/core/DeviceType.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <cstdint>
#include <string>

namespace torch_moe_ep::comm {

// Throws a RuntimeError with the operation, this rank, the ranks of the group that did not stop in
// the same collective, and what the backend said.
//
// Costs nothing until something fails: a rank that gives up says so in the group's store, waits
// kTimeToName for the others to say the same, and names those that did not. A rank that is dead,
// stuck elsewhere or slower than the time-out by more than that is among them. Where the group has
// hooks (hooks/), what they found takes the place of that.
[[noreturn]] void raise_failure(const std::string& operation,
                                c10d::ProcessGroup& group,
                                c10::DeviceType device_type,
                                const std::string& backend_message);

// The message of that error, for a thread beside the one that waits: it takes a connection of its
// own to the store. `reason` stands where the backend's words do.
std::string describe_failure_beside(const std::string& operation,
                                    c10d::ProcessGroup& group,
                                    c10::DeviceType device_type,
                                    const std::string& reason);
// A group rank's global rank.
int64_t global_rank(c10d::ProcessGroup& group, c10::DeviceType device_type, int64_t group_rank);

// Who holds a store that does not answer, as far as that is known.
std::string describe_store(c10::intrusive_ptr<c10d::Store> store);

}  // namespace torch_moe_ep::comm
