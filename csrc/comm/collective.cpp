#include "comm/collective.h"

#include <ATen/Functions.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>

#include "comm/failure.h"
#include "comm/termination.h"
#include "comm/timeout.h"

namespace torch_moe_ep::comm {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

// NCCL kills the process when a collective outlives its time-out; it keeps its own, longer one, and
// the wait for the counts (CountExchange) speaks first. Other backends raise here, within ours.
std::chrono::milliseconds collective_timeout(const Group& group, c10::DeviceType device_type) {
  return group->getBackend(device_type)->getBackendName() == "nccl"
             ? c10d::kUnsetTimeout
             : exchange_timeout(*group, device_type);
}

// One for each device, of high priority: rows are waited for by all ranks of the group.
c10::Stream communication_stream(c10::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, c10::Stream> streams;
  const std::scoped_lock lock(mutex);
  const auto found = streams.find(device.index());
  if (found != streams.end()) return found->second;
  const c10::impl::VirtualGuardImpl devices(device.type());
  const c10::Stream stream = devices.getStreamFromGlobalPool(device, /*isHighPriority=*/true);
  streams.emplace(device.index(), stream);
  return stream;
}

// Counts are there in microseconds unless a rank is late: then the core is given away.
bool is_done_within(const c10::Event& event, std::chrono::milliseconds timeout) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kSpinning(1);
  constexpr std::chrono::microseconds kNap(50);
  const auto start = Clock::now();
  while (!event.query()) {
    const auto waited = Clock::now() - start;
    if (waited > timeout) return false;
    if (waited > kSpinning) std::this_thread::sleep_for(kNap);
  }
  return true;
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
  return timeout_of(group.getBackend(device_type)->getBackendOptions()->timeout);
}

int64_t group_size(const std::string& group_name) {
  return c10d::resolve_process_group(group_name)->getSize();
}

int64_t group_rank(const std::string& group_name) {
  return c10d::resolve_process_group(group_name)->getRank();
}

Exchange::Exchange(const char* operation, Group group, at::Tensor input, at::Tensor output)
    : operation_(operation),
      group_(std::move(group)),
      input_(std::move(input)),
      output_(std::move(output)) {}

void Exchange::raise(const std::string& message) const {
  raise_failure(operation_, *group_, output_.device().type(), message);
}

void Exchange::attempt(const std::function<void()>& body) const {
  std::string message;
  try {
    body();
    return;
  } catch (const c10::Error& error) {
    message = error.what_without_backtrace();
  } catch (const std::exception& error) {
    message = error.what();
  }
  raise(message);
}

void Exchange::issue(const std::function<Work()>& start) {
  const c10::Device device = output_.device();
  if (device.is_cpu()) {
    attempt([&] { work_ = start(); });
    return;
  }
  stream_ = communication_stream(device);
  c10::Event ready(device.type());
  ready.record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  ready.block(*stream_);
  const c10::StreamGuard guard(*stream_);
  attempt([&] { start()->wait(); });
  done_.emplace(device.type());
  done_->record(*stream_);
}

at::Tensor Exchange::wait() {
  const c10::Device device = output_.device();
  if (device.is_cpu()) {
    const Waiting waiting(operation_, group_, device.type());
    attempt([this] { work_->wait(); });
  } else {
    TORCH_INTERNAL_ASSERT(done_.has_value(), "waited for twice");
    done_->block(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  }
  input_.reset();
  return std::move(output_);
}

Exchange::~Exchange() {
  if (!output_.defined() || !stream_.has_value()) return;
  try {
    input_.record_stream(*stream_);
    output_.record_stream(*stream_);
  } catch (const std::exception& error) {
    TORCH_WARN("torch_moe_ep: ", error.what());
  }
}

Exchange start_all_gather(const at::Tensor& row, const std::string& group_name) {
  TORCH_CHECK_VALUE(row.dim() == 1 && row.is_contiguous(),
                    "row must be contiguous and of one dimension, got shape ",
                    row.sizes());
  const Group group = c10d::resolve_process_group(group_name);
  at::Tensor input = row.unsqueeze(0);
  at::Tensor gathered = at::empty({group->getSize(), row.numel()}, row.options());
  c10d::AllgatherOptions options;
  options.timeout = collective_timeout(group, row.device().type());
  Exchange exchange("all-gather of numbers", group, input, gathered);
  exchange.issue([&] { return group->_allgather_base(gathered, input, options); });
  return exchange;
}

at::Tensor all_gather(const at::Tensor& row, const std::string& group_name) {
  return start_all_gather(row, group_name).wait();
}

Exchange start_all_to_all_rows(const at::Tensor& rows,
                               const std::vector<int64_t>& send_rows,
                               const std::vector<int64_t>& received_rows,
                               const std::string& group_name,
                               const at::Tensor& into) {
  TORCH_INTERNAL_ASSERT(rows.is_contiguous() && rows.size(0) == sum(send_rows));
  const Group group = c10d::resolve_process_group(group_name);
  auto sizes = rows.sizes().vec();
  sizes[0] = sum(received_rows);
  at::Tensor received = into.defined() ? into : at::empty(sizes, rows.options());
  TORCH_INTERNAL_ASSERT(received.is_contiguous() && received.sizes() == sizes);
  // As bytes: not every backend knows every dtype.
  at::Tensor output = as_bytes(received);
  at::Tensor input = as_bytes(rows);
  std::vector<int64_t> output_splits = received_rows;
  std::vector<int64_t> input_splits = send_rows;
  c10d::AllToAllOptions options;
  options.timeout = collective_timeout(group, rows.device().type());
  Exchange exchange("all-to-all of rows", group, rows, received);
  exchange.issue(
      [&] { return group->alltoall_base(output, input, output_splits, input_splits, options); });
  return exchange;
}

RowExchange::RowExchange(const std::vector<at::Tensor>& tensors,
                         const std::vector<int64_t>& send_rows,
                         const std::vector<int64_t>& received_rows,
                         const std::string& group_name,
                         const std::vector<at::Tensor>& into)
    : exchanges_(tensors.size()) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].defined()) continue;
    exchanges_[i].emplace(start_all_to_all_rows(
        tensors[i], send_rows, received_rows, group_name, into.empty() ? at::Tensor() : into[i]));
  }
}

std::vector<at::Tensor> RowExchange::wait() {
  std::vector<at::Tensor> received(exchanges_.size());
  for (size_t i = 0; i < exchanges_.size(); ++i) {
    std::optional<Exchange>& exchange = exchanges_[i];
    if (exchange.has_value()) received[i] = exchange->wait();
  }
  return received;
}

std::vector<at::Tensor> all_to_all_rows(const std::vector<at::Tensor>& tensors,
                                        const std::vector<int64_t>& send_rows,
                                        const std::vector<int64_t>& received_rows,
                                        const std::string& group_name) {
  return RowExchange(tensors, send_rows, received_rows, group_name).wait();
}

CountExchange::CountExchange(const at::Tensor& row, const std::string& group_name)
    : exchange_(start_all_gather(row, group_name)) {
  const std::optional<c10::Stream> stream = exchange_.stream_;
  if (!stream.has_value()) return;
  const at::Tensor& counts = exchange_.output_;
  const c10::StreamGuard guard(*stream);
  host_counts_ = at::empty(counts.sizes(), counts.options().device(at::kCPU).pinned_memory(true));
  host_counts_.copy_(counts, /*non_blocking=*/true);
  is_on_host_.emplace(counts.device().type());
  is_on_host_->record(*stream);
}

CountExchange::Counts CountExchange::wait() {
  if (is_on_host_.has_value()) {
    const Waiting waiting(
        exchange_.operation_, exchange_.group_, exchange_.output_.device().type());
    const auto timeout = exchange_timeout(*exchange_.group_, exchange_.output_.device().type());
    if (!is_done_within(*is_on_host_, timeout)) {
      exchange_.raise("nothing within " + std::to_string(timeout.count() / 1000.0) + " s");
    }
    is_on_host_->synchronize();
  }
  const at::Tensor counts = exchange_.wait();
  return {counts, host_counts_.defined() ? host_counts_ : counts};
}

TORCH_LIBRARY_IMPL(torch_moe_ep, CompositeExplicitAutograd, m) {
  m.impl("all_gather", &all_gather);
}

}  // namespace torch_moe_ep::comm
