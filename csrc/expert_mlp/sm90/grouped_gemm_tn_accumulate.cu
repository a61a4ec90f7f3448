#include "expert_mlp/sm90/instances.h"
#include "expert_mlp/sm90/launch.cuh"

namespace torch_moe_ep::sm90 {
namespace {

// Block M, block N, ping-pong, cluster M, cluster N, stages, store buffers of each group, chunks
// stored at a time, B kept.
template <int kBlockM,
          int kBlockN,
          bool kIsPingPong,
          int kClusterM,
          int kClusterN,
          int kStages,
          int kStoreBuffers,
          int kStoreBatch,
          bool kKeepsB = false>
using Kernel = KernelConfig<GemmLayout::kTN,
                            kBlockM,
                            kBlockN,
                            kIsPingPong,
                            kClusterM,
                            kClusterN,
                            kStages,
                            kStoreBuffers,
                            kStoreBatch,
                            kKeepsB,
                            GemmEpilogue::kAccumulate>;

}  // namespace

cudaError_t launch_tn_accumulate(const TileConfig& tile,
                                 const KernelArguments& args,
                                 int64_t max_super_tiles,
                                 cudaStream_t stream) {
  return launch_one_of<Kernel<128, 192, true, 2, 1, 4, 3, 3>,
                       Kernel<128, 256, false, 2, 1, 3, 4, 2>,
                       Kernel<128, 192, true, 1, 2, 4, 3, 3, true>,
                       Kernel<128, 128, true, 2, 1, 5, 2, 2>>(tile, args, max_super_tiles, stream);
}

}  // namespace torch_moe_ep::sm90
