// A c10d backend around another one that notes every call and leaves its results alone.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "comm/hooks/ledger.h"
#include "common/visibility.h"

namespace torch_moe_ep::comm {

// Every virtual function of c10d::Backend is forwarded; name, options and time-outs are the wrapped
// backend's. What differs: collectives of a backend that waits on the host (every one but NCCL)
// get 0.8 of the group's time-out (TORCH_MOE_EP_TIMEOUT_S) where the caller gave none, so that the
// error that names ranks comes first.
class TORCH_MOE_EP_API HookedBackend : public c10d::Backend {
 public:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;
  using TensorLists = std::vector<std::vector<at::Tensor>>;
  using Milliseconds = std::chrono::milliseconds;

  HookedBackend(c10::intrusive_ptr<c10d::Backend> inner, Place place);
  ~HookedBackend() override;

  c10::intrusive_ptr<c10d::Backend> inner() const { return inner_; }
  const std::shared_ptr<Ledger>& ledger() const { return ledger_; }
  // Answers alarms and looks for overdue calls from here on; the group must have its name.
  void watch();
  // The end of that, and of its counts in stage_counts.
  void retire();
  // For torch's eager connection: the group that is bound to the device with its backend.
  void set_group(c10d::ProcessGroup* group);

  const std::string getBackendName() const override { return inner_->getBackendName(); }
  c10::intrusive_ptr<Options> getBackendOptions() override { return inner_->getBackendOptions(); }
  bool supportsSplitting() const override { return inner_->supportsSplitting(); }
  bool supportsCoalescing() const override { return inner_->supportsCoalescing(); }
  bool supportsTimeEstimation() const override { return inner_->supportsTimeEstimation(); }
  bool supportsShrinking() const override { return inner_->supportsShrinking(); }
  bool supportsTensorAlloc(c10::DeviceIndex device_idx) override {
    return inner_->supportsTensorAlloc(device_idx);
  }
  at::Tensor allocateTensor(long size, at::TensorOptions options) override {  // NOLINT: c10d's
    return inner_->allocateTensor(size, options);
  }
  std::shared_ptr<c10::Allocator> getMemAllocator() override { return inner_->getMemAllocator(); }
  c10d::ErrorType getError() override { return inner_->getError(); }
  void setTimeout(Milliseconds timeout) override { inner_->setTimeout(timeout); }
  void setGroupUid(const std::string& group_name) override;
  void setSequenceNumberForGroup() override { inner_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return inner_->getSequenceNumberForGroup(); }
  void registerOnCompletionHook(
      std::function<void(std::shared_ptr<c10d::WorkInfo>)>&& hook) override;
  void waitForPendingWorks() override { inner_->waitForPendingWorks(); }
  void enableCollectivesTiming() override { inner_->enableCollectivesTiming(); }
  void eagerConnectSingleDevice(at::Device device) override;
  void abort() override;
  void shutdown() override;

  c10::intrusive_ptr<Backend> shrink(const std::vector<int64_t>& ranks_to_exclude,
                                     int shrink_flags,
                                     const c10::intrusive_ptr<Options>& options) override;
  c10::intrusive_ptr<Backend> split(const c10::intrusive_ptr<c10d::Store>& store,
                                    const std::vector<int>& ranks,
                                    const c10::intrusive_ptr<Options>& options) override;
  c10::intrusive_ptr<Backend> merge(const c10::intrusive_ptr<c10d::Store>& store,
                                    const c10::intrusive_ptr<Options>& options,
                                    const int& rank,
                                    const int& size) override;

  void startCoalescing() override;
  WorkPtr endCoalescing() override;
  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_coalesced(Tensors& tensors,
                              const c10d::AllreduceCoalescedOptions& options) override;
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override;
  WorkPtr allgather(TensorLists& outputs,
                    Tensors& inputs,
                    const c10d::AllgatherOptions& options) override;
  WorkPtr _allgather_base(at::Tensor& output,
                          at::Tensor& input,
                          const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_coalesced(TensorLists& outputs,
                              Tensors& inputs,
                              const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs,
                                          Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override;
  WorkPtr gather(TensorLists& outputs,
                 Tensors& inputs,
                 const c10d::GatherOptions& options) override;
  WorkPtr scatter(Tensors& outputs,
                  TensorLists& inputs,
                  const c10d::ScatterOptions& options) override;
  WorkPtr reduce_scatter(Tensors& outputs,
                         TensorLists& inputs,
                         const c10d::ReduceScatterOptions& options) override;
  WorkPtr _reduce_scatter_base(at::Tensor& output,
                               at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override;
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs,
                                          Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override;
  WorkPtr alltoall_base(at::Tensor& output,
                        at::Tensor& input,
                        std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits,
                        const c10d::AllToAllOptions& options) override;
  WorkPtr alltoall(Tensors& outputs,
                   Tensors& inputs,
                   const c10d::AllToAllOptions& options) override;
  WorkPtr send(Tensors& tensors, int destination, int tag) override;
  WorkPtr recv(Tensors& tensors, int source, int tag) override;
  WorkPtr recvAnysource(Tensors& tensors, int tag) override;
  WorkPtr barrier(const c10d::BarrierOptions& options) override;
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_for_all) override;

 private:
  template <typename CallOptions>
  CallOptions with_timeout(const CallOptions& options) const;
  // Notes the call, starts it, and puts the hooks around its work.
  template <typename Start>
  WorkPtr run(Call call, const Start& start, bool is_between_two = false);
  c10::intrusive_ptr<Backend> hooked(const c10::intrusive_ptr<Backend>& made,
                                     const c10::intrusive_ptr<c10d::Store>& store) const;
  Milliseconds timeout() const;
  void pass_description_on();

  c10::intrusive_ptr<c10d::Backend> inner_;
  std::shared_ptr<Ledger> ledger_;
  bool waits_on_host_;
  bool has_options_;
  bool is_coalescing_ = false;
  bool has_coalesced_collectives_ = false;
  bool is_watched_ = false;
  bool is_described_ = false;
  c10::weak_intrusive_ptr<c10d::ProcessGroup> group_;
};

}  // namespace torch_moe_ep::comm
