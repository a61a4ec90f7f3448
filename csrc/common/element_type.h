#pragma once

// The element types that the CUDA kernels know. Kernel headers name them without torch headers.

namespace torch_moe_ep {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

constexpr int element_bytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

}  // namespace torch_moe_ep
