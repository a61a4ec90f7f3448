// Calls from the arguments of c10d's functions.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "comm/hooks/call.h"

namespace torch_moe_ep::comm {

inline int64_t num_bytes(const at::Tensor& tensor) {
  return tensor.defined() && !tensor.is_sparse() ? static_cast<int64_t>(tensor.nbytes()) : 0;
}

inline int64_t num_bytes(const std::vector<at::Tensor>& tensors) {
  int64_t bytes = 0;
  for (const at::Tensor& tensor : tensors) bytes += num_bytes(tensor);
  return bytes;
}

inline int64_t num_bytes(const std::vector<std::vector<at::Tensor>>& lists) {
  int64_t bytes = 0;
  for (const auto& tensors : lists) bytes += num_bytes(tensors);
  return bytes;
}

inline const at::Tensor* first_of(const at::Tensor& tensor) { return &tensor; }

inline const at::Tensor* first_of(const std::vector<at::Tensor>& tensors) {
  return tensors.empty() ? nullptr : tensors.data();
}

inline const at::Tensor* first_of(const std::vector<std::vector<at::Tensor>>& lists) {
  return lists.empty() ? nullptr : first_of(lists.front());
}

inline Call call_of(const char* operation) {
  Call call;
  call.operation = operation;
  return call;
}

template <typename Inputs, typename Outputs>
Call call_of(const char* operation, const Inputs& inputs, const Outputs& outputs) {
  Call call = call_of(operation);
  const at::Tensor* first = first_of(inputs) != nullptr ? first_of(inputs) : first_of(outputs);
  if (first != nullptr && first->defined()) {
    call.dtype = first->scalar_type();
    call.device = first->device();
  }
  call.sent_bytes = num_bytes(inputs);
  call.received_bytes = num_bytes(outputs);
  return call;
}

// splits: rows of dimension 0 for each rank; none: equal parts.
inline std::vector<int64_t> split_bytes(const at::Tensor& tensor,
                                        const std::vector<int64_t>& splits) {
  std::vector<int64_t> bytes(splits);
  const int64_t rows = tensor.dim() > 0 ? tensor.size(0) : 0;
  const int64_t row_bytes = rows > 0 ? num_bytes(tensor) / rows : 0;
  for (int64_t& part : bytes) part *= row_bytes;
  return bytes;
}

inline std::vector<int64_t> bytes_of_each(const std::vector<at::Tensor>& tensors) {
  std::vector<int64_t> bytes;
  bytes.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) bytes.push_back(num_bytes(tensor));
  return bytes;
}

}  // namespace torch_moe_ep::comm
