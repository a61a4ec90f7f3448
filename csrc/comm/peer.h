// Peer transport: the GPUs of a group map each other's memory (torch's symmetric memory), and
// kernels write and read rows where they belong. Knows bytes and ranks only. CUDA alone.
//
// Every operation is collective: the ranks of a group do the same ones in the same order. They run
// on the caller's stream, one after the other also where that changes, or on the group's own
// streams beside it. Nothing waits on the host but what says so. NVLink multicast is never used.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/symm_mem/SymmetricMemory.hpp>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "comm/peer_kernels.h"
#include "comm/side_stream.h"

namespace torch_moe_ep::comm {

// Memory of the same size on every rank of a group, mapped by all of them.
struct SharedMemory {
  at::Tensor own;  // uint8 [bytes]
  c10::intrusive_ptr<c10d::symmetric_memory::SymmetricMemory> mapped;

  // Where each rank's is, an array in device memory.
  void* const* on_ranks() const { return mapped->get_buffer_ptrs_dev(); }
};

// What a group's ranks share: a control block to meet by, and one buffer for rows, which every
// operation uses from its first meeting on.
class PeerGroup {
 public:
  // The group's, made at the first call, which is collective and waits on the host. An earlier
  // failure raises.
  static PeerGroup& of(const std::string& group_name, c10::Device device);
  // Nullptr where nobody has made it.
  static PeerGroup* find(const std::string& group_name);

  int64_t size() const { return group_->getSize(); }
  int64_t rank() const { return group_->getRank(); }

  // All ranks of the group have come here: what they wrote before is there for all.
  void meet();

  struct Numbers {
    at::Tensor all;       // [P, n] on the device
    at::Tensor host_all;  // the same on the CPU, or [0, n]
  };
  // row int64 [n], contiguous, on the device. With wants_host the host waits for the numbers, by
  // looking at a counter that the device writes to its memory; a rank that stays away holds it up
  // for exchange_timeout.
  Numbers gather(const at::Tensor& row, bool wants_host);

  // At least so many bytes in every rank's buffer, the same number on every rank. Grows rarely, and
  // then waits on the host for all ranks; refused while a CUDA graph is captured.
  void reserve(int64_t num_bytes);
  const SharedMemory& buffer() const { return buffer_; }

  // This operation comes after the last one, whatever stream that was on. Returns the current
  // stream.
  c10::cuda::CUDAStream enter();
  // Streams for operations that go on beside the current stream: between ranks, and inside this
  // one. Who forks one joins it before its operation ends.
  SideStream& row_stream() { return row_stream_; }
  SideStream& copy_stream() { return copy_stream_; }

  // Waits on the host for the current stream, and raises when a peer was given up on.
  void wait_for_stream();

 private:
  using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
  PeerGroup(const Group& group, std::string name, c10::Device device);
  SharedMemory share(int64_t num_bytes) const;
  PeerMeeting meeting() const;
  void raise_if_failed() const;
  void wait_for_host_numbers(uint64_t value) const;
  bool belongs_to(const Group& group) const;

  c10::weak_intrusive_ptr<c10d::ProcessGroup> owner_;
  c10d::ProcessGroup* group_;  // alive as long as owner_ is
  std::string name_;
  c10::Device device_;
  SharedMemory control_;
  SharedMemory buffer_;
  std::vector<SharedMemory> outgrown_;  // that a CUDA graph may still name
  bool is_in_graph_ = false;
  at::Tensor state_;  // a PeerState
  // Host memory that the device writes; never freed, as a kernel on its way may still do so.
  struct HostBlock {
    PeerReport report;
    uint64_t ready;
  };
  HostBlock* host_;
  int64_t* host_numbers_;  // [P, kMaxGatheredNumbers], likewise
  uint64_t num_host_gatherings_ = 0;
  std::optional<c10::cuda::CUDAStream> last_stream_;
  SideStream row_stream_;
  SideStream copy_stream_;
};

// As many of `rows` (contiguous) as the last of `offsets` says, which the device alone need know,
// to `target`. On the current stream.
void copy_rows(const at::Tensor& rows, void* target, const at::Tensor& offsets);

}  // namespace torch_moe_ep::comm
