// A backend's work with the hooks' clock and report around its wait.
#pragma once

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <atomic>
#include <memory>
#include <vector>

#include "comm/hooks/ledger.h"

namespace torch_moe_ep::comm {

// Forwards everything. The first wait ends the call's span; a wait that fails is explained.
class HookedWork : public c10d::Work {
 public:
  HookedWork(c10::intrusive_ptr<c10d::Work> inner, std::shared_ptr<Ledger> ledger, Ticket ticket);
  ~HookedWork() override;

  bool isCompleted() override { return inner_->isCompleted(); }
  bool isSuccess() const override { return inner_->isSuccess(); }
  std::exception_ptr exception() const override { return inner_->exception(); }
  int sourceRank() const override { return inner_->sourceRank(); }
  std::vector<at::Tensor> result() override { return inner_->result(); }
  void synchronize() override;
  bool wait(std::chrono::milliseconds timeout) override;
  void blockCurrentStream() override;
  void abort() override { inner_->abort(); }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return inner_->getFuture(); }
  c10::intrusive_ptr<c10::ivalue::Future> getFutureResult() override {
    return inner_->getFutureResult();
  }
  float getDuration() const override { return inner_->getDuration(); }
  uint64_t getSequencenumber() const override { return inner_->getSequencenumber(); }

 private:
  void end();
  [[noreturn]] void fail(const std::string& backend_message) const;

  c10::intrusive_ptr<c10d::Work> inner_;
  std::shared_ptr<Ledger> ledger_;
  Ticket ticket_;
  std::atomic<bool> has_ended_ = false;
};

}  // namespace torch_moe_ep::comm
