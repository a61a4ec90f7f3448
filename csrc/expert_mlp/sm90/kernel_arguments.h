// What the host hands to a kernel, by value.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace torch_moe_ep::sm90 {

struct TileSpace {
  const int64_t* expert_offsets;
  int num_experts;
  int fixed_tiles_m;  // super tiles along M of every expert (TN); 0: from the rows of the expert
  int tiles_n;        // super tiles along N
  int group_m;        // super tiles along M that are walked together
};

struct KernelArguments {
  CUtensorMap a;
  CUtensorMap b;
  CUtensorMap out;
  CUtensorMap activation;  // SwiGLU alone
  TileSpace space;
  int k_steps;               // NT, NN: steps of 64 over K. TN counts the expert's rows instead.
  int out_rows;              // TN: M
  int columns;               // N
  float alpha;               // TN
  const float* row_weights;  // SwiGLU
};

}  // namespace torch_moe_ep::sm90
