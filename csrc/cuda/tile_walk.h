// The kernels' part of the counting sort.
#pragma once

#include <cstdint>

#include "cuda/counting_sort.h"
#include "cuda/lane_groups.h"
#include "cuda/warp.h"

namespace torchmoe::cuda {

constexpr int kWalkThreads = 4 * kWarpSize;

/// The blocks of kWalkThreads that walk every tile.
inline int64_t blocks_of_tiles(const SlotTiles& tiles) {
  constexpr int64_t kTiles = kWalkThreads / kWarpSize;
  return (tiles.num_tiles + kTiles - 1) / kTiles;
}

/// Walks the tile of this warp 32 slots at a time and calls body(slot, bucket, place) for each;
/// place is the bucket's count of the tile so far, which grows from what it is before.
template <typename Body>
__device__ void walk_tile(const CountingSort& sort, const Body& body) {
  const SlotTiles& tiles = sort.tiles;
  const int64_t tile = warp_in_grid();
  if (tile >= tiles.num_tiles) {
    return;
  }
  const int64_t first = tile * tiles.tile_slots;
  const int64_t end =
      first + tiles.tile_slots < tiles.num_slots ? first + tiles.tile_slots : tiles.num_slots;
  for (int64_t begin = first; begin < end; begin += kWarpSize) {
    const int64_t position = begin + lane_id();
    const bool inside = position < end;
    const int64_t slot = !inside || sort.serving == nullptr ? position : sort.serving[position];
    const int64_t bucket = inside ? sort.bucket_of(slot) : -1;
    const LaneGroup group = group_lanes(bucket);
    int64_t place = 0;
    if (inside && group.is_led_here()) {
      // Only this warp comes to its tile's counts, and only this lane to this one.
      int64_t& count = sort.counts[bucket * tiles.num_tiles + tile];
      place = count;
      count = place + group.size;
    }
    __syncwarp();  // another lane may lead the bucket in the next step
    place = __shfl_sync(kAllLanes, place, group.leader) + group.rank;
    if (inside) {
      body(slot, bucket, place);
    }
  }
}

}  // namespace torchmoe::cuda
