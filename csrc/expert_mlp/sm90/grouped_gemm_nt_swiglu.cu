#include "expert_mlp/sm90/instances.h"
#include "expert_mlp/sm90/launch.cuh"

namespace torch_moe_ep::sm90 {
namespace {

// Block M, block N, ping-pong, cluster M, cluster N, stages, store buffers of each group.
template <int kBlockM,
          int kBlockN,
          bool kIsPingPong,
          int kClusterM,
          int kClusterN,
          int kStages,
          int kStoreBuffers>
using Kernel = KernelConfig<GemmLayout::kNT,
                            kBlockM,
                            kBlockN,
                            kIsPingPong,
                            kClusterM,
                            kClusterN,
                            kStages,
                            kStoreBuffers,
                            1,
                            false,
                            GemmEpilogue::kSwiglu>;

}  // namespace

cudaError_t launch_nt_swiglu(const TileConfig& tile,
                             const KernelArguments& args,
                             int64_t max_super_tiles,
                             cudaStream_t stream) {
  return launch_one_of<Kernel<128, 192, true, 2, 1, 4, 2>, Kernel<128, 192, true, 1, 1, 4, 2>>(
      tile, args, max_super_tiles, stream);
}

}  // namespace torch_moe_ep::sm90
