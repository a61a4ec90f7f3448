#include "common/fresh_pages.h"

#include <ATen/Parallel.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace torch_moe_ep {
namespace {

// malloc maps blocks of this size and more from the system each time, at the latest (mallopt(3)).
constexpr int64_t kAlwaysFreshBytes = int64_t{32} << 20;
// Pages of one task: long enough to pay for the call.
constexpr int64_t kTaskBytes = int64_t{2} << 20;

#ifdef MADV_POPULATE_WRITE
void populate(char* first, char* last) { madvise(first, last - first, MADV_POPULATE_WRITE); }
#else
void populate(char* /*first*/, char* /*last*/) {}
#endif

}  // namespace

void take_fresh_pages(const at::Tensor& tensor) {
  if (static_cast<int64_t>(tensor.storage().nbytes()) < kAlwaysFreshBytes) return;
  static const int64_t page_bytes = sysconf(_SC_PAGESIZE);
  // The whole pages inside: those at the ends may hold what others own.
  char* const data = static_cast<char*>(tensor.mutable_data_ptr());
  const int64_t to_boundary = -reinterpret_cast<intptr_t>(data) & (page_bytes - 1);
  const int64_t num_pages = (static_cast<int64_t>(tensor.nbytes()) - to_boundary) / page_bytes;
  char* const pages = data + to_boundary;
  at::parallel_for(0, num_pages, kTaskBytes / page_bytes, [=](int64_t first, int64_t last) {
    populate(pages + first * page_bytes, pages + last * page_bytes);
  });
}

}  // namespace torch_moe_ep
