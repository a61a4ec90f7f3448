#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "common/element_type.h"

namespace torch_moe_ep {

// The kernels' name of a tensor's dtype; other dtypes are refused.
inline ElementType element_type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return ElementType::kFloat32;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    case at::kHalf:
      return ElementType::kFloat16;
    default:
      TORCH_CHECK_VALUE(
          false, "dtype must be float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

}  // namespace torch_moe_ep
