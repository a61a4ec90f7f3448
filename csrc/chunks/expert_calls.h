// The operators of expert_mlp for chunks, called by name.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "chunks/chunks.h"
#include "chunks/segments.h"

namespace torch_moe_ep {

// The experts of this rank and how they compute.
struct ChunkExperts {
  at::Tensor gate_up;  // [L, 2I, H]
  at::Tensor down;     // [L, H, I]
  int64_t slots_per_pass;
};

struct InputGradients {
  at::Tensor rows;
  at::Tensor row_weights;
  at::Tensor z;
  at::Tensor activation;  // no gradient: what the gradient of down is made of
};

struct WeightGradients {
  at::Tensor gate_up;
  at::Tensor down;
};

// Frozen experts need none.
struct WeightGradientsWanted {
  bool are_needed;
  double scale;
};

// Writes y, and z where it is defined, of the chunk's rows.
void call_forward(const ChunkSegments& segments,
                  int64_t chunk,
                  const ChunkRows& rows,
                  const ChunkExperts& experts,
                  const at::Tensor& y,
                  const at::Tensor& z);

// Writes the gradients of the chunk's rows. z, or undefined to compute it again from the rows.
void call_input_grads(const ChunkSegments& segments,
                      int64_t chunk,
                      const at::Tensor& grad_y,
                      const ChunkRows& rows,
                      const at::Tensor& z,
                      const ChunkExperts& experts,
                      const InputGradients& into);

// Over the rows of all chunks.
WeightGradients call_weight_grads(const ChunkSegments& segments,
                                  const at::Tensor& grad_y,
                                  const at::Tensor& rows,
                                  const InputGradients& of_rows,
                                  double weight_grad_scale);

// Both over the rows of all chunks, in passes; writes the rows and their weights of `into`. Weight
// gradients that nobody needs come back as [0].
WeightGradients call_backward_chunks(const ChunkSegments& segments,
                                     const at::Tensor& grad_y,
                                     const ChunkRows& rows,
                                     const at::Tensor& z,
                                     const ChunkExperts& experts,
                                     const WeightGradientsWanted& wanted,
                                     const ChunkRows& into);

}  // namespace torch_moe_ep
