// Prefix results over the threads of a block.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/warp.h"

namespace torchmoe::cuda {

/// The threads of a block that scans.
constexpr int kScanThreads = 1024;

struct Sum {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};

/// combine over this thread's value and those of the threads before it, for an associative combine.
/// Every thread of a block of kScanThreads must take part.
template <typename T, typename Combine>
__device__ T block_inclusive_scan(T value, const Combine& combine) {
  __shared__ T of_warps[kScanThreads / kWarpSize];
  const auto scan_warp = [&](T sum) {
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const T before = __shfl_up_sync(kAllLanes, sum, distance);
      sum = lane_id() >= distance ? combine(before, sum) : sum;
    }
    return sum;
  };
  const T in_warp = scan_warp(value);
  __syncthreads();  // threads may still read an earlier scan's sums
  if (lane_id() == kWarpSize - 1) {
    of_warps[warp_in_block()] = in_warp;
  }
  __syncthreads();
  if (warp_in_block() == 0) {
    const T sum = scan_warp(of_warps[lane_id()]);
    of_warps[lane_id()] = sum;
  }
  __syncthreads();
  return warp_in_block() == 0 ? in_warp : combine(of_warps[warp_in_block() - 1], in_warp);
}

/// The last thread's value, in every thread.
template <typename T>
__device__ T block_last(T value) {
  __shared__ T last;
  __syncthreads();  // threads may still read an earlier one
  if (threadIdx.x == blockDim.x - 1) {
    last = value;
  }
  __syncthreads();
  return last;
}

}  // namespace torchmoe::cuda
