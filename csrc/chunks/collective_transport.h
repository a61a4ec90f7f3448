// Chunks through the process group's all-to-alls (comm/collective.h).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "chunks/layout.h"
#include "chunks/transport.h"
#include "comm/collective.h"

namespace torch_moe_ep {

class CollectiveChunks : public ChunkTransport {
 public:
  // tokens: rows [T, H] and weights [T, K]; without weights rows go back with some. packed: their
  // send buffer from plan_chunks, or undefined; then each chunk is packed when it is started.
  CollectiveChunks(ChunkPlan plan,
                   const ChunkDevice& device,
                   ChunkStages stages,
                   ChunkRows tokens,
                   ChunkRows packed);

  const ChunkSegments& segments() const override { return layout_.segments(); }
  // The layout is placed once the first chunk has left.
  void start_dispatch(int64_t chunk) override;
  void finish_dispatch(int64_t chunk) override;
  ChunkRows arrived() override { return arrived_; }
  ChunkRows leaving() override { return leaving_; }
  ChunkRows kept(bool has_rows) override {
    return {has_rows ? arrived_.rows : at::Tensor(), arrived_.weights};
  }
  // Waits for the chunk before, whose way back then lies behind: its buffers are free.
  void start_combine(int64_t chunk) override;
  ChunkRows finish_combine() override;

 private:
  ChunkRows sent_rows(int64_t chunk);
  void finish_return(int64_t chunk);

  ChunkLayout layout_;
  const ChunkDevice device_;
  const ChunkStages stages_;
  ChunkRows tokens_;
  ChunkRows send_buffer_;  // [N, H] and [N]
  bool is_packed_;
  ChunkRows arrived_;   // [R, H] and [R]
  ChunkRows leaving_;   // [R, H] and [R]
  ChunkRows returned_;  // [N, H] and [N]: rows of copies, in the order in which they were sent
  std::vector<std::optional<comm::RowExchange>> dispatches_;
  std::vector<std::optional<comm::RowExchange>> returns_;
};

}  // namespace torch_moe_ep
