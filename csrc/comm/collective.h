// Collective transport: rows and counts through a c10d process group, any backend. Knows bytes and
// ranks only.
//
// Groups travel by name (c10d's registry of groups). What starts with start_ is collective over the
// group: it issues and returns, and wait() ends it. CUDA tensors go on a communication stream of
// their own, which waits for the caller's stream by an event, as the caller's stream does for it in
// wait(); nothing here waits on the host under NCCL but CountExchange. On the CPU wait() waits on
// the host. What fails or outlives exchange_timeout raises with the operation, this rank and the
// ranks that did not take part (failure.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace torch_moe_ep::comm {

int64_t group_size(const std::string& group_name);
int64_t group_rank(const std::string& group_name);

// A collective on its way. Holds its input and output until the caller's stream has waited for it,
// so that the caching allocator cannot hand their memory to anyone in between; of one that is
// dropped before, say by an exception, the allocator is told by record_stream.
class Exchange {
 public:
  // Waits as the backend does and returns the output; once.
  at::Tensor wait();

  Exchange(Exchange&& other) noexcept = default;
  Exchange& operator=(Exchange&& other) = delete;
  ~Exchange();

 private:
  using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
  using Work = c10::intrusive_ptr<c10d::Work>;
  friend class CountExchange;
  friend Exchange start_all_gather(const at::Tensor&, const std::string&);
  friend Exchange start_all_to_all_rows(const at::Tensor&,
                                        const std::vector<int64_t>&,
                                        const std::vector<int64_t>&,
                                        const std::string&,
                                        const at::Tensor&);
  Exchange(const char* operation, Group group, at::Tensor input, at::Tensor output);
  void issue(const std::function<Work()>& start);
  // What the backend throws is raised with the ranks at fault.
  void attempt(const std::function<void()>& body) const;
  [[noreturn]] void raise(const std::string& message) const;

  const char* operation_;
  Group group_;
  at::Tensor input_;
  at::Tensor output_;
  Work work_;                          // CPU
  std::optional<c10::Stream> stream_;  // CUDA: where it runs
  std::optional<c10::Event> done_;     // CUDA: its end there
};

// row [n], contiguous, the same n and dtype on every rank -> [P, n], row r from rank r.
Exchange start_all_gather(const at::Tensor& row, const std::string& group_name);
at::Tensor all_gather(const at::Tensor& row, const std::string& group_name);

// rows [sum of send_rows, ...], contiguous: the first send_rows[0] go to rank 0, and so on. Returns
// [sum of received_rows, ...], rank-major. received_rows[r] on this rank must equal what rank r
// sends here. Bytes are moved as they are, in every dtype. Where `into` is given, contiguous and of
// that shape, received rows go there.
Exchange start_all_to_all_rows(const at::Tensor& rows,
                               const std::vector<int64_t>& send_rows,
                               const std::vector<int64_t>& received_rows,
                               const std::string& group_name,
                               const at::Tensor& into = {});

// The same for tensors whose rows go together, on their way once it is made; undefined ones stay
// undefined. `into`: none, or one for each tensor.
class RowExchange {
 public:
  RowExchange(const std::vector<at::Tensor>& tensors,
              const std::vector<int64_t>& send_rows,
              const std::vector<int64_t>& received_rows,
              const std::string& group_name,
              const std::vector<at::Tensor>& into = {});
  // Waits as Exchange does; once.
  std::vector<at::Tensor> wait();

 private:
  std::vector<std::optional<Exchange>> exchanges_;
};

// There and waited for.
std::vector<at::Tensor> all_to_all_rows(const std::vector<at::Tensor>& tensors,
                                        const std::vector<int64_t>& send_rows,
                                        const std::vector<int64_t>& received_rows,
                                        const std::string& group_name);

// An all-gather of int64 numbers that the host needs as well: on CUDA they are copied to pinned
// memory behind it, on the communication stream.
class CountExchange {
 public:
  CountExchange(const at::Tensor& row, const std::string& group_name);

  struct Counts {
    at::Tensor counts;       // [P, n] on the row's device
    at::Tensor host_counts;  // the same on the CPU
  };
  // Waits on the host for the counts, on CUDA for the event of their copy: the one host
  // synchronisation of a layer's forward. A rank that stays away holds it up for exchange_timeout.
  Counts wait();

 private:
  Exchange exchange_;
  at::Tensor host_counts_;
  std::optional<c10::Event> is_on_host_;  // CUDA
};

// The time-out of an exchange on the group's backend for a device: timeout_of (timeout.h).
std::chrono::milliseconds exchange_timeout(c10d::ProcessGroup& group, c10::DeviceType device_type);

}  // namespace torch_moe_ep::comm
