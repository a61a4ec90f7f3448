// Which rows of a buffer an operation takes; passed to the kernels by value. No torch here.
// constexpr: callable on the host and, by nvcc's relaxed rule, on the device.
#pragma once

#include <cstdint>

namespace torch_moe_ep {

// Each expert has `stride` segments of consecutive rows, one behind the other, between ascending
// offsets; of these the operation takes `span` from number `first` on. Other rows are as if they
// were not there. All rows of an expert: stride 1, or first 0 and span = stride.
// Example: 2 experts in 2 chunks, offsets 0 2 3 3 6, stride 2, first 1, span 1: expert 0 takes row
// 2, expert 1 the rows 3 to 5.
struct RowSegments {
  const int64_t* offsets;  // [experts * stride + 1]
  int stride = 1;
  int first = 0;
  int span = 1;

  constexpr int64_t begin(int64_t expert) const { return offsets[expert * stride + first]; }
  constexpr int64_t end(int64_t expert) const { return offsets[expert * stride + first + span]; }
  // Whether an expert takes the row; a search through the offsets unless all rows are taken.
  constexpr bool has(int64_t row, int num_experts) const {
    int low = 0, high = num_experts * stride;
    if (row >= offsets[high]) return false;
    if (span == stride) return true;
    while (high - low > 1) {  // offsets[low] <= row < offsets[high]
      const int middle = (low + high) / 2;
      (offsets[middle] <= row ? low : high) = middle;
    }
    const int number = low % stride - first;
    return number >= 0 && number < span;
  }
};

}  // namespace torch_moe_ep
