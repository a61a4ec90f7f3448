#pragma once

#include <ATen/Dispatch.h>

// Runs a lambda with scalar_t = float, c10::BFloat16 or c10::Half: the types of every operator.
#define TORCH_MOE_EP_DISPATCH_DTYPE(TYPE, NAME, ...)                             \
  AT_DISPATCH_SWITCH(TYPE,                                                       \
                     NAME,                                                       \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE( \
                         at::kBFloat16, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))
