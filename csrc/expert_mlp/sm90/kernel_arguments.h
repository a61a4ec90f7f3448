// What the host hands to a kernel, by value.
#pragma once

#include <cuda.h>

#include "expert_mlp/tile_space.h"

namespace torch_moe_ep::sm90 {

struct KernelArguments {
  CUtensorMap a;
  CUtensorMap b;
  CUtensorMap out;
  CUtensorMap activation;  // kSwiglu, kSwigluBackward
  CUtensorMap z;           // kSwigluBackward
  TileSpace space;
  int* next_tile;            // device; the next tile to be handed out
  int k_steps;               // NT, NN: steps of 64 over K. TN counts the expert's rows instead.
  int out_rows;              // TN: M
  int columns;               // N
  float alpha;               // TN
  const float* row_weights;  // kSwiglu, kSwigluBackward
  float* partial_dots;       // kSwigluBackward
  int64_t rows;              // R
};

}  // namespace torch_moe_ep::sm90
