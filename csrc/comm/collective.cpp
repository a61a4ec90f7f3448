#include "comm/collective.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>
#include <c10/util/env.h>
#include <torch/library.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <charconv>
#include <chrono>
#include <functional>
#include <numeric>

#include "comm/failure.h"

namespace torch_moe_ep::comm {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using Work = c10::intrusive_ptr<c10d::Work>;

// NCCL kills the process when a collective outlives its time-out; it keeps its own, longer one, and
// the wait for the counts (to_host) speaks first. Other backends raise here, within ours.
std::chrono::milliseconds collective_timeout(const Group& group, c10::DeviceType device_type) {
  return group->getBackend(device_type)->getBackendName() == "nccl"
             ? c10d::kUnsetTimeout
             : exchange_timeout(*group, device_type);
}

// Waits as the backend does: on the host for gloo, on the current stream for NCCL.
void run(const char* operation,
         const Group& group,
         c10::DeviceType device_type,
         const std::function<Work()>& start) {
  std::string message;
  try {
    start()->wait();
    return;
  } catch (const c10::Error& error) {
    message = error.what_without_backtrace();
  } catch (const std::exception& error) {
    message = error.what();
  }
  raise_failure(operation, *group, device_type, message);
}

int64_t sum(const std::vector<int64_t>& rows) {
  return std::accumulate(rows.begin(), rows.end(), int64_t{0});
}

// [n, bytes of a row], the same memory.
at::Tensor as_bytes(const at::Tensor& rows) {
  const auto row_sizes = rows.sizes().slice(1);
  return rows.view({rows.size(0), c10::multiply_integers(row_sizes)}).view(at::kByte);
}

}  // namespace

std::chrono::milliseconds exchange_timeout(c10d::ProcessGroup& group, c10::DeviceType device_type) {
  const auto text = c10::utils::get_env("TORCH_MOE_EP_TIMEOUT_S");
  if (!text.has_value() || text->empty()) {
    return group.getBackend(device_type)->getBackendOptions()->timeout * 4 / 5;
  }
  int64_t seconds = 0;
  const char* end = text->data() + text->size();
  const auto parsed = std::from_chars(text->data(), end, seconds);
  TORCH_CHECK_VALUE(parsed.ec == std::errc() && parsed.ptr == end && seconds > 0,
                    "TORCH_MOE_EP_TIMEOUT_S must be a positive whole number of seconds, got ",
                    *text);
  return std::chrono::seconds(seconds);
}

int64_t group_size(const std::string& group_name) {
  return c10d::resolve_process_group(group_name)->getSize();
}

int64_t group_rank(const std::string& group_name) {
  return c10d::resolve_process_group(group_name)->getRank();
}

at::Tensor all_gather(const at::Tensor& row, const std::string& group_name) {
  TORCH_CHECK_VALUE(row.dim() == 1 && row.is_contiguous(),
                    "row must be contiguous and of one dimension, got shape ",
                    row.sizes());
  const Group group = c10d::resolve_process_group(group_name);
  at::Tensor input = row.unsqueeze(0);
  at::Tensor gathered = at::empty({group->getSize(), row.numel()}, row.options());
  c10d::AllgatherOptions options;
  options.timeout = collective_timeout(group, row.device().type());
  run("all-gather of numbers", group, row.device().type(), [&] {
    return group->_allgather_base(gathered, input, options);
  });
  return gathered;
}

at::Tensor all_to_all_rows(const at::Tensor& rows,
                           const std::vector<int64_t>& send_rows,
                           const std::vector<int64_t>& received_rows,
                           const std::string& group_name) {
  TORCH_INTERNAL_ASSERT(rows.is_contiguous() && rows.size(0) == sum(send_rows));
  const Group group = c10d::resolve_process_group(group_name);
  auto sizes = rows.sizes().vec();
  sizes[0] = sum(received_rows);
  at::Tensor received = at::empty(sizes, rows.options());
  // As bytes: not every backend knows every dtype.
  at::Tensor output = as_bytes(received);
  at::Tensor input = as_bytes(rows);
  std::vector<int64_t> output_splits = received_rows;
  std::vector<int64_t> input_splits = send_rows;
  c10d::AllToAllOptions options;
  options.timeout = collective_timeout(group, rows.device().type());
  run("all-to-all of rows", group, rows.device().type(), [&] {
    return group->alltoall_base(output, input, output_splits, input_splits, options);
  });
  return received;
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CompositeExplicitAutograd, m) {
  m.impl("all_gather", &all_gather);
}

}  // namespace torch_moe_ep::comm
