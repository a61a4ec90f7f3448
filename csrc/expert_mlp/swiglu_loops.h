// SwiGLU and its gradient over rows on the CPU. No torch here.
#pragma once

#include <cstdint>

#include "common/element_type.h"

namespace torch_moe_ep {

// Arithmetic is fp32, with one rounding to the element type. A row is one thread's work from its
// first element to its last, so results do not depend on how rows are spread over threads.
struct SwigluRows {
  ElementType element_type;  // of z, activation and their gradients
  int64_t width;             // I, elements
  const void* z;             // [rows, 2I], gate columns first
  const float* row_weights;  // [rows]
  void* activation;          // [rows, I]: row_weight * silu(gate) * up
};

struct SwigluGradientRows {
  SwigluRows forward;           // activation is computed again: the down gradient needs it
  const void* grad_activation;  // [rows, I]; may be the buffer of activation
  void* grad_z;                 // [rows, 2I]; may be the buffer of z
  float* grad_row_weights;      // [rows]: sum over i of grad_activation * silu(gate) * up
};

// Rows [first, last) of the arrays above.
void swiglu_rows(const SwigluRows& rows, int64_t first, int64_t last);
void swiglu_gradient_rows(const SwigluGradientRows& rows, int64_t first, int64_t last);

}  // namespace torch_moe_ep
