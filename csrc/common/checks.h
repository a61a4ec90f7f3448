#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

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

// A counter of copies per expert, which backward adds to. counts: of a plan, its last dimension E.
inline void check_counter(const std::optional<at::Tensor>& tokens_per_expert,
                          const at::Tensor& counts) {
  if (!tokens_per_expert.has_value()) return;
  check_int64(*tokens_per_expert, "tokens_per_expert");
  check_same_device(*tokens_per_expert, "tokens_per_expert", counts, "the plan");
  TORCH_CHECK_VALUE(
      tokens_per_expert->dim() == 1 && tokens_per_expert->sym_size(0) == counts.sym_size(-1),
      "tokens_per_expert must be [",
      counts.sym_size(-1),
      "], a number for each expert of the plan, got shape ",
      tokens_per_expert->sym_sizes());
}

}  // namespace torch_moe_ep
