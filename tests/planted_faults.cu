// One fault for each tool of compute-sanitizer, so that a run which finds nothing is known to have
// looked: `planted_faults memcheck|racecheck|initcheck|synccheck`. Built and run by
// tests/sanitize.py.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace {

constexpr int kThreads = 64;

__global__ void planted_write_past_the_end(int* numbers) { numbers[threadIdx.x + 1] = 1; }

__global__ void planted_race(int* numbers) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  numbers[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];  // the other warp's, without a barrier
}

__global__ void planted_read_of_unwritten(const int* source, int* numbers) {
  numbers[threadIdx.x] = source[threadIdx.x];
}

__global__ void planted_divergent_barrier(int* numbers) {
  if (threadIdx.x < kThreads / 4) __syncthreads();
  numbers[threadIdx.x] = 1;
}

}  // namespace

int main(int count, char** words) {
  const char* tool = count > 1 ? words[1] : "";
  int* numbers = nullptr;
  int* unwritten = nullptr;
  if (cudaMalloc(&numbers, kThreads * sizeof(int)) != cudaSuccess ||
      cudaMalloc(&unwritten, kThreads * sizeof(int)) != cudaSuccess) {
    std::fprintf(stderr, "no CUDA device\n");
    return 1;
  }
  if (std::strcmp(tool, "memcheck") == 0) {
    planted_write_past_the_end<<<1, kThreads>>>(numbers);
  } else if (std::strcmp(tool, "racecheck") == 0) {
    planted_race<<<1, kThreads>>>(numbers);
  } else if (std::strcmp(tool, "initcheck") == 0) {
    planted_read_of_unwritten<<<1, kThreads>>>(unwritten, numbers);
  } else if (std::strcmp(tool, "synccheck") == 0) {
    planted_divergent_barrier<<<1, kThreads>>>(numbers);
  } else {
    std::fprintf(stderr, "planted_faults memcheck|racecheck|initcheck|synccheck\n");
    return 1;
  }
  cudaDeviceSynchronize();
  return 0;
}
