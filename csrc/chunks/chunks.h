// chunked_experts: dispatch, expert_mlp and combine of tokens in C chunks, so that a chunk travels
// under the GEMMs of the one before.
//
//   forward   send 0 | send 1, GEMMs 0, back 0 | send 2, GEMMs 1, back 1 | ...   sum over K
//   backward  the same with gradients of the results one way and of the rows the other, then the
//             gradients of the weights once, over all rows, while the last chunk is on its way
//
// Everything is issued in this order on every rank, whatever its chunks hold, and nothing waits on
// the host (gloo: for each exchange, when its rows are needed).
//
// Rows, and what is made of them, lie in buffers of all chunks (chunks/segments.h): a chunk's GEMMs
// read and write its segments in place, what backward keeps is these buffers, and the sums over
// rows have one order.
//
// chunked_experts_forward(x [T, H], weights [T, K] fp32, plan, gate_up, down, ...) ->
//   output [T, H]         as combine makes it.
//   rows [R, H], row_weights [R]  received rows of all chunks, in the order of their segments;
//                         [0, H] unless keep_rows, and [0] unless they or z are kept.
//   z [R, 2I]             gate and up products; [0, 2I] unless keep_gate_up and in one pass.
// chunked_experts_backward(grad_output [T, H], these, plan, gate_up, down, ...) ->
//   grad_x [T, H], grad_weights [T, K], grad_gate_up [L, 2I, H], grad_down [L, H, I]
//   z [0, 2I] is computed again. The weights' gradients are [0] without needs_weight_grads. With
//   slots_per_pass > 0 the experts' backward is that of one chunk, in passes, after all gradients
//   have come: intermediates of all rows would break the bound.
//
// Collective over the group, of two ranks or more, in both directions. Deterministic. Errors as of
// dispatch, expert_mlp and combine.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "combine/gather_rows.h"
#include "common/exchange_sizes.h"
#include "dispatch/pack_rows.h"
#include "dispatch/plan_chunks.h"

namespace torch_moe_ep {

// The plan as plan_chunks returns it, or peer_plan_chunks.
struct ChunkPlan {
  at::Tensor slot_of_copy;
  at::Tensor counts;
  at::Tensor host_counts;
  int64_t top_k;
  int64_t row_alignment;
  std::string group_name;
  // Over peers alone (dispatch/peer_dispatch.h).
  at::Tensor segment_offsets;  // else undefined
  int64_t capacity;
  int64_t num_sms;

  bool is_over_peers() const { return segment_offsets.defined(); }
};

// Rows and the router weights that go with them.
struct ChunkRows {
  at::Tensor rows;
  at::Tensor weights;  // undefined where none go
};

// What a transport's two ways are called in reports; static strings.
struct ChunkStages {
  const char* dispatch;
  const char* combine;
};

class ChunkTransport;

// What chunks need of a device.
struct ChunkDevice {
  void (*pack_rows_into)(const Source&, const Packed& into, const Padding*);
  Gathered (*gather_rows)(const at::Tensor& rows,
                          const std::optional<at::Tensor>& row_weights,
                          const at::Tensor& slot_of_copy,
                          int64_t copies_per_output);
  ChunkPlaces (*place_chunks)(const at::Tensor& counts,
                              const std::vector<ExchangeSizes>& sizes,
                              int64_t rank,
                              int64_t row_alignment);
  // For a plan over peers. tokens: rows [T, H] and weights [T, K], contiguous, or no weights.
  std::unique_ptr<ChunkTransport> (*over_peers)(const ChunkPlan& plan,
                                                ChunkStages stages,
                                                const ChunkRows& tokens);
};

}  // namespace torch_moe_ep
