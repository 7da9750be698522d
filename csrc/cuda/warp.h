// What the 32 threads of a warp do together. Every thread of the warp must take part.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace torchmoe::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

__device__ inline int lane_id() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}

__device__ inline int warp_in_block() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}

/// The warp's number over the whole grid.
__device__ inline int64_t warp_in_grid() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
}

/// The sum over the lanes, in every lane the same bits: the tree's shape is fixed.
template <typename T>
__device__ T warp_sum(T value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

/// combine over the lanes, for an associative and commutative combine: largest, smallest, best.
template <typename T, typename Combine>
__device__ T warp_reduce(T value, const Combine& combine) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = combine(value, static_cast<T>(__shfl_xor_sync(kAllLanes, value, distance)));
  }
  return value;
}

/// The sum over the lanes below this one.
template <typename T>
__device__ T warp_exclusive_sum(T value) {
  T sum = value;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T below = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane_id() >= distance) {
      sum += below;
    }
  }
  return sum - value;
}

}  // namespace torchmoe::cuda
