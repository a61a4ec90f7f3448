#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

// Checks of arguments that more than one stage has. Every message says the argument, the rule, what
// came and the way out.

namespace torch_moe_ep {

inline void check_dim(const at::Tensor& tensor, const char* name, int64_t dim, const char* shape) {
  TORCH_CHECK_VALUE(tensor.dim() == dim, name, " must be ", shape, ", got shape ", tensor.sizes());
}

inline void check_element_type(const at::Tensor& tensor, const char* name) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                    name,
                    " must be float32, bfloat16 or float16, got ",
                    type,
                    " (call .to(torch.float32))");
}

inline void check_float32(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat,
                    name,
                    " must be float32, got ",
                    tensor.scalar_type(),
                    " (call .float())");
}

inline void check_int64(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kLong,
                    name,
                    " must be int64, got ",
                    tensor.scalar_type(),
                    " (call .long())");
}

inline void check_same_device(const at::Tensor& tensor,
                              const char* name,
                              const at::Tensor& other,
                              const char* other_name) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(),
                    name,
                    " is on ",
                    tensor.device(),
                    ", but ",
                    other_name,
                    " is on ",
                    other.device(),
                    " (move one of them)");
}

}  // namespace torch_moe_ep
