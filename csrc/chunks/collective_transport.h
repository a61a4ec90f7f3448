// Chunks through the process group's all-to-alls (comm/collective.h).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "chunks/layout.h"
#include "chunks/transport.h"
#include "comm/collective.h"

namespace torch_moe_ep {

// What its exchanges are called in reports; static strings.
struct ChunkStages {
  const char* dispatch;
  const char* combine;
};

class CollectiveChunks : public ChunkTransport {
 public:
  // tokens: rows [T, H] and weights [T, K]. packed: their send buffer from plan_chunks, or
  // undefined; then each chunk is packed when it is started. `layout` outlives this, and is placed
  // before anything is finished.
  CollectiveChunks(const ChunkLayout& layout,
                   const ChunkDevice& device,
                   ChunkStages stages,
                   ChunkRows tokens,
                   ChunkRows packed);

  void start_dispatch(int64_t chunk) override;
  ChunkRows finish_dispatch(int64_t chunk) override;
  // Waits for the chunk before, whose way back then lies behind: its buffers are free.
  void start_combine(int64_t chunk, const ChunkRows& rows) override;
  ChunkRows finish_combine() override;

 private:
  ChunkRows sent_rows(int64_t chunk);
  void finish_return(int64_t chunk);

  const ChunkLayout& layout_;
  const ChunkDevice device_;
  const ChunkStages stages_;
  ChunkRows tokens_;
  ChunkRows send_buffer_;  // [N, H] and [N]
  bool is_packed_;
  ChunkRows returned_;  // [N, H] and [N]: rows of copies, in the order in which they were sent
  std::vector<std::optional<comm::RowExchange>> dispatches_;
  std::vector<std::optional<comm::RowExchange>> returns_;
};

}  // namespace torch_moe_ep
