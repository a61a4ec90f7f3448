// The order in which chunks travel and are computed; knows neither device nor transport.
#pragma once

#include <ATen/core/Tensor.h>

#include "chunks/chunks.h"
#include "chunks/expert_calls.h"
#include "chunks/segments.h"
#include "chunks/transport.h"

namespace torch_moe_ep {

// What backward reads, of all chunks.
struct KeptRows {
  ChunkRows arrived;  // [R, H] and [R]; or [0, H], and without z [0]
  at::Tensor z;       // [R, 2I], or [0, 2I]
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
                           const WeightGradientsWanted& wanted);

}  // namespace torch_moe_ep
