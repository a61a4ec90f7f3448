#include "expert_mlp/sm90/instances.h"
#include "expert_mlp/sm90/launch.cuh"

namespace torch_moe_ep::sm90 {
namespace {

// Block M, block N, ping-pong, cluster M, cluster N, stages, store buffers of each group, chunks
// stored at a time.
template <int kBlockM,
          int kBlockN,
          bool kIsPingPong,
          int kClusterM,
          int kClusterN,
          int kStages,
          int kStoreBuffers,
          int kStoreBatch>
using Kernel = KernelConfig<GemmLayout::kNN,
                            kBlockM,
                            kBlockN,
                            kIsPingPong,
                            kClusterM,
                            kClusterN,
                            kStages,
                            kStoreBuffers,
                            kStoreBatch>;

}  // namespace

cudaError_t launch_nn(const TileConfig& tile,
                      const KernelArguments& args,
                      int64_t max_super_tiles,
                      cudaStream_t stream) {
  return launch_one_of<Kernel<128, 256, false, 2, 1, 3, 4, 2>,
                       Kernel<256, 128, false, 1, 2, 4, 1, 1>,
                       Kernel<128, 256, false, 1, 1, 3, 4, 2>,
                       Kernel<128, 192, true, 2, 1, 5, 1, 1>>(tile, args, max_super_tiles, stream);
}

}  // namespace torch_moe_ep::sm90
