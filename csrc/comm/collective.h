// Collective transport: rows and counts through a c10d process group, any backend. Knows bytes and
// ranks only.
//
// Groups travel by name (c10d's registry of groups). all_gather and all_to_all_rows are collective
// over the group. Under NCCL nothing here waits on the host but to_host; gloo waits for every
// exchange. What fails or outlives exchange_timeout raises with the operation, this rank and the
// ranks that did not take part (failure.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace torch_moe_ep::comm {

int64_t group_size(const std::string& group_name);
int64_t group_rank(const std::string& group_name);

// row [n], contiguous, the same n and dtype on every rank -> [P, n], row r from rank r.
at::Tensor all_gather(const at::Tensor& row, const std::string& group_name);

// The values of a CUDA tensor on the CPU, in pinned memory: waits for the event of the copy, the
// one host synchronisation of a layer's forward. What comes before it on the current stream, an
// all_gather of a rank that stays away among it, may hold it up for exchange_timeout.
at::Tensor to_host(const at::Tensor& counts, const std::string& group_name);

// TORCH_MOE_EP_TIMEOUT_S seconds where that is set, else 0.8 of the group's own time-out, so that
// the error that names ranks comes before the backend's.
std::chrono::milliseconds exchange_timeout(c10d::ProcessGroup& group, c10::DeviceType device_type);

// rows [sum of send_rows, ...], contiguous: the first send_rows[0] go to rank 0, and so on. Returns
// [sum of received_rows, ...], rank-major. received_rows[r] on this rank must equal what rank r
// sends here. Bytes are moved as they are, in every dtype.
at::Tensor all_to_all_rows(const at::Tensor& rows,
                           const std::vector<int64_t>& send_rows,
                           const std::vector<int64_t>& received_rows,
                           const std::string& group_name);

}  // namespace torch_moe_ep::comm
