#include "comm/nodes.h"

#include <c10/util/accumulate.h>

#include "comm/collective.h"

namespace torch_moe_ep::comm {
namespace {

// [P] rows for every rank of the group, of [M] rows for the ranks of this rank's place.
std::vector<int64_t> for_same_place(const std::vector<int64_t>& rows, const NodeSplit& split) {
  std::vector<int64_t> all(split.num_ranks(), 0);
  for (int64_t node = 0; node < split.num_nodes; ++node) {
    all[split.rank_of(node, split.local)] = rows[node];
  }
  return all;
}

// The same of [G] rows for the ranks of this rank's node.
std::vector<int64_t> for_same_node(const std::vector<int64_t>& rows, const NodeSplit& split) {
  std::vector<int64_t> all(split.num_ranks(), 0);
  for (int64_t local = 0; local < split.ranks_per_node; ++local) {
    all[split.rank_of(split.node, local)] = rows[local];
  }
  return all;
}

}  // namespace

NodeSplit node_split(const std::string& group_name, int64_t ranks_per_node) {
  return split_ranks(group_size(group_name), group_rank(group_name), ranks_per_node);
}

std::vector<at::Tensor> exchange_between_nodes(const std::vector<at::Tensor>& tensors,
                                               const std::vector<int64_t>& send_rows,
                                               const std::vector<int64_t>& received_rows,
                                               const NodeSplit& split,
                                               const std::string& group_name) {
  return all_to_all_rows(
      tensors, for_same_place(send_rows, split), for_same_place(received_rows, split), group_name);
}

std::vector<at::Tensor> exchange_inside_node(const std::vector<at::Tensor>& tensors,
                                             const std::vector<int64_t>& send_rows,
                                             const std::vector<int64_t>& received_rows,
                                             const NodeSplit& split,
                                             const std::string& group_name) {
  return all_to_all_rows(
      tensors, for_same_node(send_rows, split), for_same_node(received_rows, split), group_name);
}

int64_t bytes_to_other_nodes(const at::Tensor& rows,
                             const std::vector<int64_t>& send_rows,
                             const NodeSplit& split) {
  const int64_t row_bytes =
      c10::multiply_integers(rows.sizes().slice(1)) * static_cast<int64_t>(rows.element_size());
  int64_t bytes = 0;
  for (int64_t node = 0; node < split.num_nodes; ++node) {
    if (node != split.node) bytes += send_rows[node] * row_bytes;
  }
  return bytes;
}

}  // namespace torch_moe_ep::comm
