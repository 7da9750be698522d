#include "cuda/limit_capacity_kernel.h"

#include "cuda/tile_walk.h"

namespace torchmoe::cuda {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) keep_routed_kernel(int64_t num_slots,
                                                               int64_t num_experts,
                                                               const int64_t* indices,
                                                               int64_t* limited) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot < num_slots) {
    const int64_t expert = indices[slot];
    limited[slot] = expert >= 0 && expert < num_experts ? expert : -1;
  }
}

__global__ void __launch_bounds__(kWalkThreads)
    drop_overflow_kernel(CountingSort sort, const int64_t* capacity, int64_t* limited) {
  walk_tile(sort, [&](int64_t slot, int64_t bucket, int64_t place) {
    limited[slot] = bucket < sort.num_experts && place < capacity[bucket] ? bucket : -1;
  });
}

}  // namespace

void keep_routed(Stream stream,
                 int64_t num_slots,
                 int64_t num_experts,
                 const int64_t* indices,
                 int64_t* limited) {
  launch(stream,
         (num_slots + kThreads - 1) / kThreads,
         kThreads,
         0,
         keep_routed_kernel,
         num_slots,
         num_experts,
         indices,
         limited);
}

void drop_overflow(Stream stream,
                   const CountingSort& sort,
                   const int64_t* capacity,
                   int64_t* limited) {
  int64_t* no_offsets = nullptr;
  count_slots(stream, sort, no_offsets);
  launch(stream,
         blocks_of_tiles(sort.tiles),
         kWalkThreads,
         0,
         drop_overflow_kernel,
         sort,
         capacity,
         limited);
}

}  // namespace torchmoe::cuda
