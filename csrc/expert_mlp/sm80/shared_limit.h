// A way to run the tile of devices with less shared memory on any device, for tests.
#pragma once

#include "expert_mlp/grouped_gemm.h"

namespace torch_moe_ep::sm80 {

// As grouped_gemm of grouped_gemm.h with at most max_shared_bytes of shared memory a CTA.
cudaError_t grouped_gemm_within(const GroupedGemmParams& params,
                                int max_shared_bytes,
                                cudaStream_t stream);

}  // namespace torch_moe_ep::sm80
