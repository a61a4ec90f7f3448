#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/env.h>
#include <torch/library.h>
#include <ATen/cuda/CUDAGraphsUtils.cuh>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "comm/collective.h"
#include "comm/failure.h"
#include "comm/label.h"
#include "comm/peer.h"
#include "comm/termination.h"

namespace torch_moe_ep::comm {
namespace {

namespace symmetric = c10d::symmetric_memory;

constexpr char kNoMulticast[] = "TORCH_SYMM_MEM_DISABLE_MULTICAST";
constexpr char kOperation[] = "exchange through peer memory";
constexpr int64_t kBufferGranularity = 2 << 20;  // bytes; of a GPU's memory mapping
// What the host waits beyond the device's time-out, whose answer names the peer.
constexpr std::chrono::milliseconds kHostGrace(2000);

// torch makes a multicast object of every symmetric allocation unless this says no. A program that
// uses multicast can take the NVLink switches of a shared host out of service.
class WithoutMulticast {
 public:
  WithoutMulticast() : before_(c10::utils::get_env(kNoMulticast)) {
    c10::utils::set_env(kNoMulticast, "1", /*overwrite=*/true);
  }
  ~WithoutMulticast() { c10::utils::set_env(kNoMulticast, before_.value_or("0").c_str(), true); }
  WithoutMulticast(const WithoutMulticast&) = delete;
  WithoutMulticast& operator=(const WithoutMulticast&) = delete;

 private:
  std::optional<std::string> before_;
};

bool is_capturing() {
  return at::cuda::currentStreamCaptureStatusMayInitCtx() != at::cuda::CaptureStatus::None;
}

bool is_capturing(const c10::cuda::CUDAStream& stream) {
  cudaStreamCaptureStatus status{};
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// Groups live as long as the process: their memory may be in use until its end.
struct Registry {
  std::mutex mutex;
  std::map<std::string, std::unique_ptr<PeerGroup>> groups;
};

Registry& registry() {
  static auto* found = new Registry();
  return *found;
}

template <typename T>
T read_host(const T& value) {
  return *static_cast<const volatile T*>(&value);
}

}  // namespace

PeerGroup& PeerGroup::of(const std::string& group_name, c10::Device device) {
  const Group group = c10d::resolve_process_group(group_name);
  const std::scoped_lock lock(registry().mutex);
  auto& found = registry().groups[group_name];
  // A group of the same name may have been destroyed and made again.
  if (!found || !found->belongs_to(group)) {
    found.reset();
    found.reset(new PeerGroup(group, group_name, device));
  }
  TORCH_CHECK_VALUE(found->device_ == device,
                    "group ",
                    group_name,
                    " shares memory on ",
                    found->device_,
                    ", got tensors on ",
                    device,
                    " (use one device a process)");
  found->raise_if_failed();
  return *found;
}

PeerGroup* PeerGroup::find(const std::string& group_name) {
  const Group group = c10d::resolve_process_group(group_name);
  const std::scoped_lock lock(registry().mutex);
  const auto found = registry().groups.find(group_name);
  const bool is_there = found != registry().groups.end() && found->second->belongs_to(group);
  return is_there ? found->second.get() : nullptr;
}

PeerGroup::PeerGroup(const Group& group, std::string name, c10::Device device)
    : owner_(group),
      group_(group.get()),
      name_(std::move(name)),
      device_(device),
      row_stream_(device, SideStream::Priority::kHigh),
      copy_stream_(device, SideStream::Priority::kNormal) {
  TORCH_CHECK_VALUE(group->getSize() <= kMaxPeers,
                    "the peer transport takes groups of at most ",
                    kMaxPeers,
                    " ranks, got ",
                    group->getSize());
  TORCH_CHECK(!is_capturing(),
              "the peer transport maps its memory at the first forward, which cannot be captured "
              "in a CUDA graph; run the layer once before");
  static_assert(sizeof(PeerState) % sizeof(int64_t) == 0);
  state_ = at::zeros({sizeof(PeerState) / sizeof(int64_t)},
                     at::TensorOptions().dtype(at::kLong).device(device));
  C10_CUDA_CHECK(cudaHostAlloc(reinterpret_cast<void**>(&host_), sizeof(HostBlock), 0));
  const auto num_numbers = static_cast<size_t>(group->getSize()) * kMaxGatheredNumbers;
  C10_CUDA_CHECK(
      cudaHostAlloc(reinterpret_cast<void**>(&host_numbers_), num_numbers * sizeof(int64_t), 0));
  host_->report = {};
  host_->ready = 0;
  control_ = share(control_bytes(static_cast<int>(group->getSize())));
}

bool PeerGroup::belongs_to(const Group& group) const { return owner_.lock().get() == group.get(); }

SharedMemory PeerGroup::share(int64_t num_bytes) const {
  const WithoutMulticast without_multicast;
  SharedMemory memory;
  memory.own = symmetric::empty_strided_p2p(
      {num_bytes}, {1}, at::kByte, device_, name_, /*alloc_id=*/std::nullopt);
  memory.own.zero_();
  // Zeros are there, and what ran before is over, on every rank that has come to the rendezvous.
  C10_CUDA_CHECK(cudaStreamSynchronize(at::cuda::getCurrentCUDAStream(device_.index())));
  memory.mapped = symmetric::rendezvous(memory.own, name_);
  return memory;
}

void PeerGroup::reserve(int64_t num_bytes) {
  const bool is_captured = is_capturing();
  is_in_graph_ = is_in_graph_ || is_captured;
  const int64_t have = buffer_.own.defined() ? buffer_.own.numel() : 0;
  if (num_bytes <= have) return;
  TORCH_CHECK(!is_captured,
              "the peer transport's buffer has ",
              have,
              " bytes and would grow to ",
              num_bytes,
              ", which cannot be captured in a CUDA graph; run the layer once with as many tokens "
              "before");
  // A quarter more than asked for at the second time, so that exact budgets seldom grow.
  const int64_t wanted = have == 0 ? num_bytes : num_bytes + num_bytes / 4;
  const int64_t rounded = (wanted + kBufferGranularity - 1) / kBufferGranularity;
  SharedMemory grown = share(rounded * kBufferGranularity);
  if (is_in_graph_) outgrown_.push_back(buffer_);
  buffer_ = std::move(grown);
}

c10::cuda::CUDAStream PeerGroup::enter() {
  const auto stream = at::cuda::getCurrentCUDAStream(device_.index());
  if (last_stream_.has_value() && *last_stream_ != stream &&
      is_capturing(*last_stream_) == is_capturing(stream)) {
    make_wait(stream, *last_stream_);
  }
  last_stream_ = stream;
  return stream;
}

PeerMeeting PeerGroup::meeting() const {
  const Label label = current_label();
  PeerMeeting meeting = {};
  meeting.control = control_.on_ranks();
  meeting.state = static_cast<PeerState*>(state_.mutable_data_ptr());
  meeting.report = &host_->report;
  meeting.num_ranks = static_cast<int>(size());
  meeting.rank = static_cast<int>(rank());
  meeting.timeout_ns = std::chrono::nanoseconds(exchange_timeout(*group_, device_.type())).count();
  meeting.stage = label.stage;
  meeting.layer = label.layer;
  return meeting;
}

void PeerGroup::meet() { C10_CUDA_CHECK(launch_meeting(meeting(), enter())); }

PeerGroup::Numbers PeerGroup::gather(const at::Tensor& row, bool wants_host) {
  TORCH_CHECK_VALUE(row.numel() <= kMaxGatheredNumbers,
                    "at most ",
                    kMaxGatheredNumbers,
                    " numbers a rank are gathered, got ",
                    row.numel());
  TORCH_CHECK(!wants_host || !is_capturing(),
              "budget=\"exact\" waits on the host for the counts, which cannot be captured in a "
              "CUDA graph; take budget=\"bounded\"");
  Numbers numbers = {at::empty({size(), row.numel()}, row.options()),
                     at::empty({0, row.numel()}, row.options().device(at::kCPU))};
  GatheredNumbers params = {};
  params.meeting = meeting();
  params.own = row.const_data_ptr<int64_t>();
  params.all = numbers.all.mutable_data_ptr<int64_t>();
  params.count = static_cast<int>(row.numel());
  if (wants_host) {
    params.host_all = host_numbers_;
    params.host_ready = &host_->ready;
    params.host_value = ++num_host_gatherings_;
  }
  C10_CUDA_CHECK(launch_gather_numbers(params, enter()));
  if (wants_host) {
    wait_for_host_numbers(params.host_value);
    numbers.host_all = at::empty(numbers.all.sizes(), row.options().device(at::kCPU));
    std::copy_n(host_numbers_, numbers.all.numel(), numbers.host_all.mutable_data_ptr<int64_t>());
  }
  return numbers;
}

// Numbers are there in microseconds unless a rank is late: then the core is given away.
void PeerGroup::wait_for_host_numbers(uint64_t value) const {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kSpinning(1);
  constexpr std::chrono::microseconds kNap(50);
  const Waiting waiting(kOperation, owner_.lock(), device_.type());
  const auto timeout = exchange_timeout(*group_, device_.type()) + kHostGrace;
  const auto start = Clock::now();
  while (read_host(host_->ready) != value) {
    raise_if_failed();
    const auto waited = Clock::now() - start;
    if (waited > timeout) {
      raise_failure(kOperation,
                    *group_,
                    device_.type(),
                    "nothing within " + std::to_string(timeout.count() / 1000.0) + " s");
    }
    if (waited > kSpinning) std::this_thread::sleep_for(kNap);
  }
  std::atomic_thread_fence(std::memory_order_acquire);
}

void PeerGroup::raise_if_failed() const {
  if (read_host(host_->report.has_failed) == 0) return;
  std::atomic_thread_fence(std::memory_order_acquire);
  const PeerReport& report = host_->report;
  std::string ranks;
  for (int64_t rank = 0; rank < size(); ++rank) {
    if ((report.missing >> rank & 1) == 0) continue;
    if (!ranks.empty()) ranks += ", ";
    ranks += std::to_string(global_rank(*group_, device_.type(), rank));
  }
  const std::string layer = layer_name(static_cast<int32_t>(report.layer));
  TORCH_CHECK(false,
              "torch_moe_ep: the ",
              kOperation,
              " failed on global rank ",
              global_rank(*group_, device_.type(), rank()),
              "; global ranks that did not take part: ",
              ranks,
              " (dead, stuck elsewhere, or slower than the time-out of ",
              exchange_timeout(*group_, device_.type()).count() / 1000.0,
              " s; ",
              layer.empty() ? "" : "layer " + layer + ", ",
              "stage ",
              report.stage != nullptr ? report.stage : "unknown",
              ")");
}

void PeerGroup::wait_for_stream() {
  constexpr std::chrono::microseconds kNap(20);
  at::cuda::CUDAEvent done;
  done.record(at::cuda::getCurrentCUDAStream(device_.index()));
  while (!done.query()) {
    raise_if_failed();
    std::this_thread::sleep_for(kNap);
  }
  raise_if_failed();
}

void copy_rows(const at::Tensor& rows, void* target, const at::Tensor& offsets) {
  CountedCopy params = {};
  params.source = rows.const_data_ptr();
  params.target = target;
  params.unit_bytes = (rows.dim() == 2 ? rows.size(1) : 1) * rows.element_size();
  params.num_units = offsets.const_data_ptr<int64_t>() + offsets.numel() - 1;
  params.max_units = rows.size(0);
  C10_CUDA_CHECK(launch_counted_copy(params, at::cuda::getCurrentCUDAStream()));
}

namespace {

void check_peers(const at::Tensor& like, const std::string& group_name) {
  const c10::cuda::CUDAGuard guard(like.device());
  PeerGroup* peers = PeerGroup::find(group_name);
  if (peers != nullptr) peers->wait_for_stream();
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) { m.impl("check_peers", &check_peers); }

}  // namespace torch_moe_ep::comm
