// The stable counting sort of the slots by expert, without atomics. The slots, in the order in
// which they are walked, are cut into tiles, a warp to a tile: it walks its tile once to count each
// bucket's slots, the counts of a bucket are summed over the tiles before, and it walks its tile
// again to hand each slot its place in the bucket.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "cuda/stream.h"

namespace torchmoe::cuda {

/// How slots are cut into tiles, from their number alone.
struct SlotTiles {
  int64_t num_slots;
  int64_t tile_slots;  // a multiple of 32
  int64_t num_tiles;

  explicit SlotTiles(int64_t num_slots)
      : num_slots(num_slots),
        tile_slots(slots_for(num_slots)),
        num_tiles(ceil_div(num_slots, tile_slots)) {}

 private:
  /// Enough tiles to fill a device, few enough that counts [E + 1, num_tiles] take less memory than
  /// logits [T, E] do for any usual K.
  static constexpr int64_t slots_for(int64_t num_slots) {
    constexpr int64_t kMaxTiles = 4096;
    constexpr int64_t kMinSlots = 256;
    const int64_t least = ceil_div(num_slots, kMaxTiles);
    return least <= kMinSlots ? kMinSlots : ceil_div(least, 32) * 32;
  }
  static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

struct CountingSort {
  SlotTiles tiles;
  int64_t num_experts;
  const int64_t* experts;  // [N], indexed by slot; outside [0, E): unrouted, bucket E
  const int64_t* serving;  // [N], the slots as they are walked, a permutation; null: slot order
  int64_t* counts;         // [E + 1, num_tiles], zero before the first walk

  TORCHMOE_HOST_DEVICE int64_t bucket_of(int64_t slot) const {
    const int64_t expert = experts[slot];
    return expert >= 0 && expert < num_experts ? expert : num_experts;
  }
};

/// The first walk and the sums: counts become each bucket's slots in the tiles before. With
/// offsets [E + 1], where the buckets start.
void count_slots(Stream stream, const CountingSort& sort, int64_t* offsets);

}  // namespace torchmoe::cuda
