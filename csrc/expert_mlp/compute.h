// What the operators of expert_mlp compute on a device, of all rows of the experts or of a chunk's.
//
// Inputs are contiguous and checked. Results go into the tensors given, contiguous, or into new
// ones where these are undefined; of the rows that the experts do not have nothing is read or
// written. Letters and formulas: expert_mlp.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "expert_mlp/expert_segments.h"

namespace torch_moe_ep {

struct MlpInputs {
  at::Tensor rows;         // [R, H]
  at::Tensor row_weights;  // [R]
  at::Tensor gate_up;      // [L, 2I, H]
  at::Tensor down;         // [L, H, I]

  MlpInputs contiguous() const {
    return {rows.contiguous(), row_weights.contiguous(), gate_up.contiguous(), down.contiguous()};
  }
};

struct MlpOutputs {
  at::Tensor y;  // [R, H]
  at::Tensor z;  // [R, 2I]
};

struct MlpInputGradients {
  at::Tensor rows;         // [R, H]
  at::Tensor row_weights;  // [R]
  at::Tensor z;            // [R, 2I]
  at::Tensor activation;   // [R, I], no gradient: what that of down is made of
};

struct MlpGradients {
  at::Tensor rows;
  at::Tensor row_weights;
  at::Tensor gate_up;
  at::Tensor down;
};

struct MlpCompute {
  // z comes back where `keeps_z` and all is computed in one pass; else undefined.
  MlpOutputs (*forward)(const ExpertSegments& segments,
                        const MlpInputs& inputs,
                        int64_t slots_per_pass,
                        bool keeps_z,
                        MlpOutputs into);
  // z, or undefined to compute it again from the rows, which are not read else.
  MlpInputGradients (*input_grads)(const ExpertSegments& segments,
                                   const at::Tensor& grad_y,
                                   const MlpInputs& inputs,
                                   const at::Tensor& z,
                                   MlpInputGradients into);
  // Of gate_up and down.
  MlpGradients (*weight_grads)(const ExpertSegments& segments,
                               const at::Tensor& grad_y,
                               const at::Tensor& rows,
                               const at::Tensor& grad_z,
                               const at::Tensor& activation,
                               double weight_grad_scale);
  // z [R, 2I], or [0, 2I] to compute it again. into.gate_up and into.down: fp32 tensors that the
  // weights' gradients are added to, which then do not come back, nor do those that nobody needs.
  MlpGradients (*backward)(const ExpertSegments& segments,
                           const at::Tensor& grad_y,
                           const MlpInputs& inputs,
                           const at::Tensor& z,
                           double weight_grad_scale,
                           int64_t slots_per_pass,
                           bool needs_weight_grads,
                           MlpGradients into);
};

extern const MlpCompute kComputeCpu;
extern const MlpCompute kComputeCuda;

}  // namespace torch_moe_ep
