// The order in which chunks travel and are computed; knows neither device nor transport.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "chunks/chunks.h"
#include "chunks/segments.h"
#include "chunks/transport.h"

namespace torch_moe_ep {

// The experts of this rank and how they compute.
struct ChunkExperts {
  at::Tensor gate_up;  // [L, 2I, H]
  at::Tensor down;     // [L, H, I]
  int64_t slots_per_pass;
};

// What backward reads, in the order of the whole.
struct KeptRows {
  at::Tensor rows;
  at::Tensor row_weights;
  at::Tensor z;
};

struct ChunkForward {
  at::Tensor output;
  KeptRows kept;
};

struct ChunkBackward {
  at::Tensor x;
  at::Tensor weights;
  at::Tensor gate_up;
  at::Tensor down;
};

ChunkForward run_forward(ChunkTransport& transport,
                         const ChunkSegments& segments,
                         const ChunkExperts& experts,
                         bool keep_rows,
                         bool keep_gate_up);

// transport: of the output's gradient.
ChunkBackward run_backward(ChunkTransport& transport,
                           const ChunkSegments& segments,
                           const ChunkExperts& experts,
                           const KeptRows& kept,
                           double weight_grad_scale);

}  // namespace torch_moe_ep
