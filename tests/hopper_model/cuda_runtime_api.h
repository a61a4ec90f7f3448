// What the Hopper kernels need of CUDA itself, on the host.
#pragma once

#include "device.h"

using cudaError_t = int;
using cudaStream_t = void*;
