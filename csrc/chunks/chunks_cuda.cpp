#include <torch/library.h>

#include "chunks/run_chunks.h"

namespace torch_moe_ep {
namespace {

constexpr ChunkDevice kDevice = {&pack_rows_into_cuda, &gather_rows_cuda, &place_chunks_cuda};

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) {
  m.impl("chunked_experts_forward", &chunked_experts_forward<kDevice>);
  m.impl("chunked_experts_backward", &chunked_experts_backward<kDevice>);
}

}  // namespace torch_moe_ep
