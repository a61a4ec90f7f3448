// Collective transport: rows and counts through a c10d process group, any backend. Knows bytes and
// ranks only.
//
// Groups travel by name (c10d's registry of groups). Every function but group_size, group_rank and
// to_host is collective over the group. Under NCCL nothing here waits on the host but to_host; gloo
// waits for every exchange. A failed or timed-out collective raises with the operation, this rank
// and the ranks that did not take part (failure.h); its time-out is TORCH_MOE_EP_TIMEOUT_S seconds
// where that is set, else the process group's own.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace torch_moe_ep::comm {

int64_t group_size(const std::string& group_name);
int64_t group_rank(const std::string& group_name);

// row [n], contiguous, the same n and dtype on every rank -> [P, n], row r from rank r.
at::Tensor all_gather(const at::Tensor& row, const std::string& group_name);

// The values on the CPU. Waits for the current stream when `counts` is on a GPU: the one host
// synchronisation of a layer's forward.
at::Tensor to_host(const at::Tensor& counts);

// rows [sum of send_rows, ...], contiguous: the first send_rows[0] go to rank 0, and so on. Returns
// [sum of received_rows, ...], rank-major. received_rows[r] on this rank must equal what rank r
// sends here. Bytes are moved as they are, in every dtype.
at::Tensor all_to_all_rows(const at::Tensor& rows,
                           const std::vector<int64_t>& send_rows,
                           const std::vector<int64_t>& received_rows,
                           const std::string& group_name);

}  // namespace torch_moe_ep::comm
