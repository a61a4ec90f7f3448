// Launching one instance of the kernel; used by the files that instantiate.
#pragma once

#include <algorithm>

#include "expert_mlp/sm90/kernel.cuh"

namespace torch_moe_ep::sm90 {

// How many clusters run at once: no more are launched, they are persistent.
template <class Config>
cudaError_t num_resident_clusters(cudaLaunchConfig_t config, int* clusters) {
  if constexpr (Config::kClusterSize > 1) {
    return cudaOccupancyMaxActiveClusters(clusters, grouped_gemm_kernel<Config>, &config);
  } else {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    return cudaDeviceGetAttribute(clusters, cudaDevAttrMultiProcessorCount, device);
  }
}

template <class Config>
cudaError_t launch(const KernelArguments& args, int64_t max_super_tiles, cudaStream_t stream) {
  const auto kernel = grouped_gemm_kernel<Config>;
  cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {Config::kClusterSize, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(Config::kClusterSize);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Config::kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  error = num_resident_clusters<Config>(config, &clusters);
  if (error != cudaSuccess) return error;
  if (clusters < 1) return cudaErrorInvalidConfiguration;
  const int64_t used = std::min<int64_t>(clusters, max_super_tiles);
  config.gridDim = dim3(static_cast<unsigned>(used * Config::kClusterSize));
  return cudaLaunchKernelEx(&config, kernel, args);
}

// The first instance whose tile is asked for.
template <class... Configs>
cudaError_t launch_one_of(const TileConfig& tile,
                          const KernelArguments& args,
                          int64_t max_super_tiles,
                          cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  const auto try_config = [&]<class Config>() {
    TileConfig wanted = tile;
    wanted.group_m = Config::tile().group_m;
    if (!(wanted == Config::tile())) return false;
    error = launch<Config>(args, max_super_tiles, stream);
    return true;
  };
  (try_config.template operator()<Configs>() || ...);
  return error;
}

}  // namespace torch_moe_ep::sm90
