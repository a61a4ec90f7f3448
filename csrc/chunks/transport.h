// What the pipeline asks of a transport: rows of a chunk leave, and arrive, apart from each other.
//
// start_ issues and returns; finish_ makes the current stream (gloo: the host) wait for what was
// started. Chunks are started in ascending order, each once and before it is finished.
#pragma once

#include <cstdint>

#include "chunks/chunks.h"

namespace torch_moe_ep {

class ChunkTransport {
 public:
  ChunkTransport() = default;
  ChunkTransport(const ChunkTransport&) = delete;
  ChunkTransport& operator=(const ChunkTransport&) = delete;
  virtual ~ChunkTransport() = default;

  // The chunk's tokens leave for their experts' ranks.
  virtual void start_dispatch(int64_t chunk) = 0;
  // Its rows here, in expert order, padding rows zero, and their weights where tokens have some.
  virtual ChunkRows finish_dispatch(int64_t chunk) = 0;
  // The chunk's rows leave for their tokens' ranks, in the order of finish_dispatch.
  virtual void start_combine(int64_t chunk, const ChunkRows& rows) = 0;
  // Of all chunks: sums over K [T, H], and the weights of copies [T, K] where rows had some.
  virtual ChunkRows finish_combine() = 0;
};

}  // namespace torch_moe_ep
