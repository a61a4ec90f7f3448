// Chunks between GPUs that map each other's memory (comm/peer.h). CUDA alone.
//
// Rows are written into their segments on their owners, where the experts read them, and results
// are read where the experts wrote them: two regions of the peers' buffer, arrived and leaving, so
// that both directions are under way at once. What moves rows runs on a stream of its own:
//
//   start of the operation   meeting: nobody reads or writes the buffers for what came before
//   a chunk's dispatch       rows of its tokens written to their owners; meeting: all have come
//   a chunk's combine        after its GEMMs: meeting: all results are in place; read and summed
//
// One meeting at the start does for all chunks, since no slot is used twice in an operation: chunks
// have segments of their own, in either region. The next operation's first meeting comes after this
// one's last read of a peer's memory, on every rank, and after what its experts read here, since
// the stream that moves rows joins the caller's at the end.
#pragma once

#include <ATen/cuda/CUDAEvent.h>

#include <cstdint>
#include <vector>

#include "chunks/chunks.h"
#include "chunks/segments.h"
#include "chunks/transport.h"
#include "combine/gather_rows.h"
#include "comm/peer.h"
#include "common/peer_region.h"

namespace torch_moe_ep {

class PeerChunks : public ChunkTransport {
 public:
  // tokens: rows [T, H] and weights [T, K], contiguous, or no weights; then rows go back with some.
  // May grow the peers' buffer, which waits on the host for all ranks.
  PeerChunks(ChunkPlan plan, ChunkStages stages, ChunkRows tokens);
  // Also after an error: what is still on its way has memory that is freed behind this.
  ~PeerChunks() override;

  const ChunkSegments& segments() const override { return segments_; }
  void start_dispatch(int64_t chunk) override;
  void finish_dispatch(int64_t chunk) override;
  ChunkRows arrived() override;
  ChunkRows leaving() override;
  ChunkRows kept(bool has_rows) override;
  void start_combine(int64_t chunk) override;
  ChunkRows finish_combine() override;

 private:
  ChunkRows rows_in(const PeerRegion& region, bool has_weights) const;
  void push(int64_t chunk);
  void join();

  const ChunkPlan plan_;
  const ChunkStages stages_;
  const ChunkRows tokens_;
  const bool sends_weights_;  // else they come back
  comm::PeerGroup& peers_;
  const ChunkSegments segments_;
  PeerRegion arrived_;
  PeerRegion leaving_;
  Gathered sums_;                               // [T, H], and weights [T, K] or [0]
  std::vector<at::cuda::CUDAEvent> have_come_;  // rows of each chunk that was started
  bool is_moving_ = false;                      // the row stream is forked
  bool is_copying_ = false;                     // and the copy stream
};

}  // namespace torch_moe_ep
