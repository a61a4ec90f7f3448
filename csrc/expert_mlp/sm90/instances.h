// The instances, one function a file so that they compile side by side.
#pragma once

#include "expert_mlp/sm90/choose_tile.h"
#include "expert_mlp/sm90/kernel_arguments.h"

namespace torch_moe_ep::sm90 {

// cudaErrorInvalidValue if no instance has the tile. max_super_tiles bounds the grid.
cudaError_t launch_nt(const TileConfig& tile,
                      const KernelArguments& args,
                      int64_t max_super_tiles,
                      cudaStream_t stream);
cudaError_t launch_nt_swiglu(const TileConfig& tile,
                             const KernelArguments& args,
                             int64_t max_super_tiles,
                             cudaStream_t stream);
cudaError_t launch_nn(const TileConfig& tile,
                      const KernelArguments& args,
                      int64_t max_super_tiles,
                      cudaStream_t stream);
cudaError_t launch_nn_swiglu_backward(const TileConfig& tile,
                                      const KernelArguments& args,
                                      int64_t max_super_tiles,
                                      cudaStream_t stream);
cudaError_t launch_tn(const TileConfig& tile,
                      const KernelArguments& args,
                      int64_t max_super_tiles,
                      cudaStream_t stream);
cudaError_t launch_tn_accumulate(const TileConfig& tile,
                                 const KernelArguments& args,
                                 int64_t max_super_tiles,
                                 cudaStream_t stream);

}  // namespace torch_moe_ep::sm90
