// The lanes of a warp that share a key.
#pragma once

#include <cstdint>

#include "cuda/warp.h"

namespace torchmoe::cuda {

/// This lane's place among those with its key.
struct LaneGroup {
  int leader;  // the lowest lane
  int size;
  int rank;  // how many of its lanes are below this one

  __device__ bool is_led_here() const { return rank == 0; }
};

__device__ inline LaneGroup group_lanes(int64_t key) {
  const unsigned lanes = __match_any_sync(kAllLanes, key);
  const unsigned below = (1U << lane_id()) - 1;
  return {__ffs(static_cast<int>(lanes)) - 1, __popc(lanes), __popc(lanes & below)};
}

}  // namespace torchmoe::cuda
