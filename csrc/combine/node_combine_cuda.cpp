#include <torch/library.h>

#include "combine/node_combine.h"

namespace torch_moe_ep {

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) {
  m.impl("node_combine", &node_combine<&gather_rows_cuda>);
}

}  // namespace torch_moe_ep
