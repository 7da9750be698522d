// Sums over the threads of a block.
#pragma once

#include "cuda/launch.h"

namespace torchmoe::cuda {

/// For a block of `threads`: the sum over the threads that agree in threadIdx.x % width. A tree of
/// fixed shape; threads and width are powers of two.
template <int threads, typename T>
__device__ T block_sum(T value, int width) {
  __shared__ T sums[threads];
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // threads may still read an earlier call's sums
  sums[thread] = value;
  for (int distance = threads / 2; distance >= width; distance /= 2) {
    __syncthreads();
    if (thread < distance) {
      sums[thread] += sums[thread + distance];
    }
  }
  __syncthreads();
  return sums[thread % width];
}

}  // namespace torchmoe::cuda
