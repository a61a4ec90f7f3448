// What the pipeline asks of a transport: rows of a chunk leave, and arrive, apart from each other.
//
// Rows of all chunks lie in one buffer each way (chunks/segments.h); the experts
// read and write a chunk's segments where they lie. start_ issues and returns; finish_ makes the
// current stream (gloo: the host) wait for what was started. Chunks are started in ascending order,
// each once, and finished in that order.
#pragma once

#include <cstdint>

#include "chunks/chunks.h"
#include "chunks/segments.h"

namespace torch_moe_ep {

class ChunkTransport {
 public:
  ChunkTransport() = default;
  ChunkTransport(const ChunkTransport&) = delete;
  ChunkTransport& operator=(const ChunkTransport&) = delete;
  virtual ~ChunkTransport() = default;

  // Where its rows lie. The offsets on the device are there after start_dispatch(0).
  virtual const ChunkSegments& segments() const = 0;

  // The chunk's tokens leave for their experts' ranks.
  virtual void start_dispatch(int64_t chunk) = 0;
  // Its rows lie in its segments of arrived(), and their weights where tokens have some; padding
  // rows are zeros.
  virtual void finish_dispatch(int64_t chunk) = 0;
  // Rows [R, H], and weights [R] where tokens have some, of all chunks. Segments of chunks that are
  // not finished hold anything. Asked for after start_dispatch(0).
  virtual ChunkRows arrived() = 0;
  // Where results are written before start_combine: rows [R, H], and weights [R] where rows go back
  // with some. Asked for after start_dispatch(0).
  virtual ChunkRows leaving() = 0;
  // arrived() of all chunks in memory that lasts, for backward; without rows their weights alone.
  // Asked for when all are finished.
  virtual ChunkRows kept(bool has_rows) = 0;
  // What lies in the chunk's segments of leaving() goes back to its tokens' ranks.
  virtual void start_combine(int64_t chunk) = 0;
  // Of all chunks: sums over K [T, H], and the weights of copies [T, K] where rows had some.
  virtual ChunkRows finish_combine() = 0;
};

}  // namespace torch_moe_ep
