#pragma once

#include <ATen/core/Tensor.h>

namespace torch_moe_ep {

enum class Destination {
  kReadSoon,   // the next loop reads it: it should stay in the caches
  kReadLater,  // written past them
};

// out = beta * out + alpha * left right on the CPU, for left [M, K], right [K, N], out [M, N] of
// one dtype, any strides for left and right, contiguous rows in out; beta is 0 or 1, and with 0
// what out holds is not read. Sums of fp32 are fp32.
//
// fp32 goes through packed panels (panels.h) where the processor has AVX2 or AVX-512, all else
// through at::addmm. With panels an element's bits depend on its row of left and its column of
// right alone: not on M, N, or the number of threads. On two cores of an AMD EPYC, 8 experts with H
// = 1024 and I = 3584: weight gradients at 220 GFLOP/s with 512 rows and 210 with 64, where MKL
// does 175 to 190 and 105.
void multiply(const at::Tensor& out,
              const at::Tensor& left,
              const at::Tensor& right,
              double alpha = 1.0,
              double beta = 0.0,
              Destination destination = Destination::kReadSoon);

}  // namespace torch_moe_ep
