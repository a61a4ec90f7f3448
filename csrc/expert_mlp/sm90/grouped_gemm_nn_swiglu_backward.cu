#include "expert_mlp/sm90/instances.h"
#include "expert_mlp/sm90/launch.cuh"

namespace torch_moe_ep::sm90 {
namespace {

// Ping-pong, as the epilogue is long: z is read, two gradients and the activation are written.
using Kernel = KernelConfig<GemmLayout::kNN,
                            128,
                            192,
                            true,
                            2,
                            1,
                            4,  // stages
                            2,  // buffers of each group for z and what is stored
                            1,
                            false,
                            GemmEpilogue::kSwigluBackward>;

}  // namespace

cudaError_t launch_nn_swiglu_backward(const TileConfig& tile,
                                      const KernelArguments& args,
                                      int64_t max_super_tiles,
                                      cudaStream_t stream) {
  return launch_one_of<Kernel>(tile, args, max_super_tiles, stream);
}

}  // namespace torch_moe_ep::sm90
