#include "cuda/counting_sort.h"

#include "cuda/block_scan.h"
#include "cuda/tile_walk.h"

namespace torchmoe::cuda {

namespace {

__global__ void __launch_bounds__(kWalkThreads) count_kernel(CountingSort sort) {
  walk_tile(sort, [](int64_t /*slot*/, int64_t /*bucket*/, int64_t /*place*/) {});
}

/// Replaces each of `size` values by the sum of those before it; the result is the sum of all. For
/// a block of kScanThreads.
__device__ int64_t sums_before(int64_t* values, int64_t size) {
  int64_t before = 0;
  for (int64_t begin = 0; begin < size; begin += kScanThreads) {
    const int64_t i = begin + threadIdx.x;
    const int64_t value = i < size ? values[i] : 0;
    const int64_t up_to_here = block_inclusive_scan(value, Sum{});
    if (i < size) {
      values[i] = before + up_to_here - value;
    }
    before += block_last(up_to_here);
  }
  return before;
}

/// A block sums one bucket's counts over the tiles.
__global__ void __launch_bounds__(kScanThreads)
    bucket_sums_kernel(CountingSort sort, int64_t* totals) {
  const int64_t num_tiles = sort.tiles.num_tiles;
  const int64_t total = sums_before(sort.counts + blockIdx.x * num_tiles, num_tiles);
  if (totals != nullptr && threadIdx.x == 0) {
    totals[blockIdx.x] = total;
  }
}

/// One block turns the buckets' totals into their offsets.
__global__ void __launch_bounds__(kScanThreads) offsets_kernel(int64_t* totals, int64_t size) {
  sums_before(totals, size);
}

}  // namespace

void count_slots(Stream stream, const CountingSort& sort, int64_t* offsets) {
  const int64_t num_buckets = sort.num_experts + 1;
  launch(stream, blocks_of_tiles(sort.tiles), kWalkThreads, 0, count_kernel, sort);
  launch(stream, num_buckets, kScanThreads, 0, bucket_sums_kernel, sort, offsets);
  if (offsets != nullptr) {
    launch(stream, 1, kScanThreads, 0, offsets_kernel, offsets, num_buckets);
  }
}

}  // namespace torchmoe::cuda
