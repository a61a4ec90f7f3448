#include <torch/library.h>

#include <memory>

#include "chunks/peer_transport.h"
#include "chunks/run_chunks.h"

namespace torch_moe_ep {
namespace {

std::unique_ptr<ChunkTransport> over_peers(const ChunkPlan& plan,
                                           ChunkStages stages,
                                           const ChunkRows& tokens) {
  return std::make_unique<PeerChunks>(plan, stages, tokens);
}

constexpr ChunkDevice kDevice = {
    &pack_rows_into_cuda, &gather_rows_cuda, &place_chunks_cuda, &over_peers};

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CUDA, m) {
  m.impl("chunked_experts_forward", &chunked_experts_forward<kDevice>);
  m.impl("chunked_experts_backward", &chunked_experts_backward<kDevice>);
}

}  // namespace torch_moe_ep
