#include "comm/hooks/hooked_backend.h"

#include <c10/util/Exception.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "comm/hooks/calls.h"
#include "comm/hooks/hooked_work.h"
#include "comm/hooks/order_guard.h"
#include "comm/hooks/registry.h"
#include "comm/hooks/report.h"
#include "comm/hooks/watcher.h"
#include "comm/timeout.h"

namespace torch_moe_ep::comm {
namespace {

using WorkPtr = HookedBackend::WorkPtr;

bool has_options(c10d::Backend& backend) {
  try {
    return static_cast<bool>(backend.getBackendOptions());
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace

HookedBackend::HookedBackend(c10::intrusive_ptr<c10d::Backend> inner, Place place)
    : c10d::Backend(inner->getRank(), inner->getSize()),
      inner_(std::move(inner)),
      ledger_(std::make_shared<Ledger>(std::move(place))),
      waits_on_host_(inner_->getBackendName() != "nccl"),
      has_options_(has_options(*inner_)),
      group_(c10::intrusive_ptr<c10d::ProcessGroup>()) {
  setBoundDeviceId(inner_->getBoundDeviceId());
  register_ledger(ledger_);
}

HookedBackend::~HookedBackend() { retire(); }

void HookedBackend::retire() {
  unregister_ledger(ledger_.get());
  if (std::exchange(is_watched_, false)) forget_ledger(ledger_.get());
}

void HookedBackend::watch() {
  if (is_watched_) return;
  is_watched_ = true;
  // A backend that waits on the host raises by itself when a call is overdue.
  const c10::weak_intrusive_ptr<c10d::Backend> backend(inner_);
  watch_ledger(ledger_, [backend, is_asked = !waits_on_host_ && has_options_] {
    const auto alive = backend.lock();
    return is_asked && alive ? timeout_of(alive->getBackendOptions()->timeout) : Milliseconds(0);
  });
}

void HookedBackend::set_group(c10d::ProcessGroup* group) {
  group_ = c10::weak_intrusive_ptr<c10d::ProcessGroup>(
      c10::intrusive_ptr<c10d::ProcessGroup>::unsafe_reclaim_from_nonowning(group));
}

void HookedBackend::setGroupUid(const std::string& group_name) {
  Backend::setGroupUid(group_name);
  inner_->setGroupUid(group_name);
  ledger_->rename(group_name, getGroupDesc());
  watch();
}

// c10d sets the description by a function that is not virtual.
void HookedBackend::pass_description_on() {
  if (is_described_ || getGroupDesc().empty()) return;
  is_described_ = true;
  inner_->setGroupDesc(getGroupDesc());
  ledger_->rename("", getGroupDesc());
}

// The wrapper's own hook only says that there is one: the wrapped backend calls it.
void HookedBackend::registerOnCompletionHook(
    std::function<void(std::shared_ptr<c10d::WorkInfo>)>&& hook) {
  inner_->registerOnCompletionHook(std::move(hook));
  onCompletionHook_ = [](const std::shared_ptr<c10d::WorkInfo>&) {};
}

// torch binds the device on a group of its own making, not on the one that holds this backend.
void HookedBackend::eagerConnectSingleDevice(at::Device device) {
  pass_description_on();
  setBoundDeviceId(device);
  inner_->setBoundDeviceId(device);
  if (const auto group = group_.lock()) group->setBoundDeviceId(device);
  inner_->eagerConnectSingleDevice(device);
}

void HookedBackend::abort() {
  retire();
  inner_->abort();
}

void HookedBackend::shutdown() {
  retire();
  inner_->shutdown();
}

c10::intrusive_ptr<c10d::Backend> HookedBackend::hooked(
    const c10::intrusive_ptr<Backend>& made, const c10::intrusive_ptr<c10d::Store>& store) const {
  if (!made) return made;
  Place place;
  place.rank = made->getRank();
  place.size = made->getSize();
  if (has_options(*made)) {
    place.global_ranks = made->getBackendOptions()->global_ranks_in_group;
  }
  place.store = store ? store : ledger_->place().store;
  return c10::make_intrusive<HookedBackend>(made, std::move(place));
}

c10::intrusive_ptr<c10d::Backend> HookedBackend::shrink(
    const std::vector<int64_t>& ranks_to_exclude,
    int shrink_flags,
    const c10::intrusive_ptr<Options>& options) {
  return hooked(inner_->shrink(ranks_to_exclude, shrink_flags, options), {});
}

c10::intrusive_ptr<c10d::Backend> HookedBackend::split(const c10::intrusive_ptr<c10d::Store>& store,
                                                       const std::vector<int>& ranks,
                                                       const c10::intrusive_ptr<Options>& options) {
  return hooked(inner_->split(store, ranks, options), store);
}

c10::intrusive_ptr<c10d::Backend> HookedBackend::merge(const c10::intrusive_ptr<c10d::Store>& store,
                                                       const c10::intrusive_ptr<Options>& options,
                                                       const int& rank,
                                                       const int& size) {
  return hooked(inner_->merge(store, options, rank, size), store);
}

HookedBackend::Milliseconds HookedBackend::timeout() const {
  const auto own = has_options_ ? inner_->getBackendOptions()->timeout : kBackendDefaultTimeout;
  return timeout_of(own);
}

template <typename CallOptions>
CallOptions HookedBackend::with_timeout(const CallOptions& options) const {
  CallOptions changed = options;
  if (waits_on_host_ && changed.timeout == c10d::kUnsetTimeout) changed.timeout = timeout();
  return changed;
}

template <typename Start>
WorkPtr HookedBackend::run(Call call, const Start& start, bool is_between_two) {
  pass_description_on();
  call.label = current_label();
  if (!is_between_two) OrderGuard::get().note(call, getGroupDesc(), getSize());
  if (is_coalescing_ && !is_between_two) has_coalesced_collectives_ = true;
  Ticket ticket = ledger_->begin(call, is_between_two);
  if (hook_settings().is_checked && !is_between_two && !is_coalescing_) {
    compare_before_start(*ledger_, call, timeout());
  }
  WorkPtr work = start();
  // Without a work the caller's stream has it behind it; inside of a group of calls the end does.
  if (!work || is_coalescing_) {
    ledger_->end(ticket, !is_coalescing_);
    return work;
  }
  if (!waits_on_host_ && ticket.number > 0) ledger_->watch(ticket.number, work);
  return c10::make_intrusive<HookedWork>(std::move(work), ledger_, std::move(ticket));
}

void HookedBackend::startCoalescing() {
  inner_->startCoalescing();
  is_coalescing_ = true;
  has_coalesced_collectives_ = false;
}

WorkPtr HookedBackend::endCoalescing() {
  is_coalescing_ = false;
  return run(
      call_of("end of coalescing"),
      [&] { return inner_->endCoalescing(); },
      /*is_between_two=*/!has_coalesced_collectives_);
}

WorkPtr HookedBackend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  return run(call_of("broadcast", tensors, tensors),
             [&] { return inner_->broadcast(tensors, with_timeout(options)); });
}

WorkPtr HookedBackend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  return run(call_of("all-reduce", tensors, tensors),
             [&] { return inner_->allreduce(tensors, with_timeout(options)); });
}

WorkPtr HookedBackend::allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) {
  return run(call_of("sparse all-reduce"),
             [&] { return inner_->allreduce_sparse(tensors, with_timeout(options)); });
}

WorkPtr HookedBackend::allreduce_coalesced(Tensors& tensors,
                                           const c10d::AllreduceCoalescedOptions& options) {
  return run(call_of("all-reduce", tensors, tensors),
             [&] { return inner_->allreduce_coalesced(tensors, with_timeout(options)); });
}

WorkPtr HookedBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  return run(call_of("reduce", tensors, tensors),
             [&] { return inner_->reduce(tensors, with_timeout(options)); });
}

WorkPtr HookedBackend::allgather(TensorLists& outputs,
                                 Tensors& inputs,
                                 const c10d::AllgatherOptions& options) {
  return run(call_of("all-gather", inputs, outputs),
             [&] { return inner_->allgather(outputs, inputs, with_timeout(options)); });
}

WorkPtr HookedBackend::_allgather_base(at::Tensor& output,
                                       at::Tensor& input,
                                       const c10d::AllgatherOptions& options) {
  return run(call_of("all-gather", input, output),
             [&] { return inner_->_allgather_base(output, input, with_timeout(options)); });
}

WorkPtr HookedBackend::allgather_coalesced(TensorLists& outputs,
                                           Tensors& inputs,
                                           const c10d::AllgatherOptions& options) {
  return run(call_of("all-gather", inputs, outputs),
             [&] { return inner_->allgather_coalesced(outputs, inputs, with_timeout(options)); });
}

WorkPtr HookedBackend::allgather_into_tensor_coalesced(Tensors& outputs,
                                                       Tensors& inputs,
                                                       const c10d::AllgatherOptions& options) {
  return run(call_of("all-gather", inputs, outputs), [&] {
    return inner_->allgather_into_tensor_coalesced(outputs, inputs, with_timeout(options));
  });
}

WorkPtr HookedBackend::gather(TensorLists& outputs,
                              Tensors& inputs,
                              const c10d::GatherOptions& options) {
  return run(call_of("gather", inputs, outputs),
             [&] { return inner_->gather(outputs, inputs, with_timeout(options)); });
}

WorkPtr HookedBackend::scatter(Tensors& outputs,
                               TensorLists& inputs,
                               const c10d::ScatterOptions& options) {
  return run(call_of("scatter", inputs, outputs),
             [&] { return inner_->scatter(outputs, inputs, with_timeout(options)); });
}

WorkPtr HookedBackend::reduce_scatter(Tensors& outputs,
                                      TensorLists& inputs,
                                      const c10d::ReduceScatterOptions& options) {
  return run(call_of("reduce-scatter", inputs, outputs),
             [&] { return inner_->reduce_scatter(outputs, inputs, with_timeout(options)); });
}

WorkPtr HookedBackend::_reduce_scatter_base(at::Tensor& output,
                                            at::Tensor& input,
                                            const c10d::ReduceScatterOptions& options) {
  return run(call_of("reduce-scatter", input, output),
             [&] { return inner_->_reduce_scatter_base(output, input, with_timeout(options)); });
}

WorkPtr HookedBackend::reduce_scatter_tensor_coalesced(Tensors& outputs,
                                                       Tensors& inputs,
                                                       const c10d::ReduceScatterOptions& options) {
  return run(call_of("reduce-scatter", inputs, outputs), [&] {
    return inner_->reduce_scatter_tensor_coalesced(outputs, inputs, with_timeout(options));
  });
}

WorkPtr HookedBackend::alltoall_base(at::Tensor& output,
                                     at::Tensor& input,
                                     std::vector<int64_t>& output_splits,
                                     std::vector<int64_t>& input_splits,
                                     const c10d::AllToAllOptions& options) {
  Call call = call_of("all-to-all", input, output);
  call.sent_to = split_bytes(input, input_splits);
  call.received_from = split_bytes(output, output_splits);
  return run(std::move(call), [&] {
    return inner_->alltoall_base(output, input, output_splits, input_splits, with_timeout(options));
  });
}

WorkPtr HookedBackend::alltoall(Tensors& outputs,
                                Tensors& inputs,
                                const c10d::AllToAllOptions& options) {
  Call call = call_of("all-to-all", inputs, outputs);
  call.sent_to = bytes_of_each(inputs);
  call.received_from = bytes_of_each(outputs);
  return run(std::move(call),
             [&] { return inner_->alltoall(outputs, inputs, with_timeout(options)); });
}

WorkPtr HookedBackend::send(Tensors& tensors, int destination, int tag) {
  return run(
      call_of("send", tensors, Tensors()),
      [&] { return inner_->send(tensors, destination, tag); },
      /*is_between_two=*/true);
}

WorkPtr HookedBackend::recv(Tensors& tensors, int source, int tag) {
  return run(
      call_of("receive", Tensors(), tensors),
      [&] { return inner_->recv(tensors, source, tag); },
      /*is_between_two=*/true);
}

WorkPtr HookedBackend::recvAnysource(Tensors& tensors, int tag) {
  return run(
      call_of("receive", Tensors(), tensors),
      [&] { return inner_->recvAnysource(tensors, tag); },
      /*is_between_two=*/true);
}

WorkPtr HookedBackend::barrier(const c10d::BarrierOptions& options) {
  return run(call_of("barrier"), [&] { return inner_->barrier(with_timeout(options)); });
}

void HookedBackend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_for_all) {
  inner_->monitoredBarrier(options, wait_for_all);
}

}  // namespace torch_moe_ep::comm
