#include <torch/library.h>

#include <memory>

#include "chunks/run_chunks.h"

namespace torch_moe_ep {
namespace {

std::unique_ptr<ChunkTransport> over_peers(const ChunkPlan& /*plan*/,
                                           ChunkStages /*stages*/,
                                           const ChunkRows& /*tokens*/) {
  TORCH_CHECK_VALUE(false,
                    "a plan of peer_plan_chunks is for GPUs that map each other's memory, got "
                    "tokens on the CPU (call plan_chunks)");
}

constexpr ChunkDevice kDevice = {
    &pack_rows_into_cpu, &gather_rows_cpu, &place_chunks_cpu, &over_peers};

}  // namespace

TORCH_LIBRARY_IMPL(torch_moe_ep, CPU, m) {
  m.impl("chunked_experts_forward", &chunked_experts_forward<kDevice>);
  m.impl("chunked_experts_backward", &chunked_experts_backward<kDevice>);
}

}  // namespace torch_moe_ep
