#include "cuda/dispatch_plan_kernel.h"

#include "cuda/tile_walk.h"

namespace torchmoe::cuda {

namespace {

__global__ void __launch_bounds__(kWalkThreads) place_kernel(CountingSort sort,
                                                             const int64_t* expert_offsets,
                                                             int64_t* row_to_slot,
                                                             int64_t* slot_to_row) {
  walk_tile(sort, [&](int64_t slot, int64_t bucket, int64_t place) {
    const int64_t row = expert_offsets[bucket] + place;
    row_to_slot[row] = slot;
    slot_to_row[slot] = row;
  });
}

}  // namespace

void dispatch_plan(Stream stream,
                   const CountingSort& sort,
                   int64_t* expert_offsets,
                   int64_t* row_to_slot,
                   int64_t* slot_to_row) {
  count_slots(stream, sort, expert_offsets);
  launch(stream,
         blocks_of_tiles(sort.tiles),
         kWalkThreads,
         0,
         place_kernel,
         sort,
         expert_offsets,
         row_to_slot,
         slot_to_row);
}

}  // namespace torchmoe::cuda
