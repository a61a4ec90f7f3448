// The two hops between ranks of several nodes: the group's own all-to-all with nothing for the
// ranks that a hop leaves out, so that no further communicator is made. Knows bytes and ranks only.
//
// Both are collective over the whole group and wait as comm/collective.h says.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/node_split.h"

namespace torch_moe_ep::comm {

// The group's ranks as nodes of ranks_per_node each; ValueError where they do not divide.
NodeSplit node_split(const std::string& group_name, int64_t ranks_per_node);

// Tensors [sum of send_rows, ...], contiguous, that go together: the first send_rows[0] rows go to
// the rank of this rank's place on node 0, and so on. Returns [sum of received_rows, ...] of each,
// node-major; undefined ones stay undefined.
std::vector<at::Tensor> exchange_between_nodes(const std::vector<at::Tensor>& tensors,
                                               const std::vector<int64_t>& send_rows,
                                               const std::vector<int64_t>& received_rows,
                                               const NodeSplit& split,
                                               const std::string& group_name);

// The same among the ranks of this rank's node, one number of rows for each of them.
std::vector<at::Tensor> exchange_inside_node(const std::vector<at::Tensor>& tensors,
                                             const std::vector<int64_t>& send_rows,
                                             const std::vector<int64_t>& received_rows,
                                             const NodeSplit& split,
                                             const std::string& group_name);

// Bytes of rows that leave this rank's node in exchange_between_nodes.
int64_t bytes_to_other_nodes(const at::Tensor& rows,
                             const std::vector<int64_t>& send_rows,
                             const NodeSplit& split);

}  // namespace torch_moe_ep::comm
