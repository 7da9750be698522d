#include "cuda/gemm/tile_map.h"

#include "cuda/block_scan.h"

namespace torchmoe::cuda {

namespace {

constexpr int kThreads = 256;

struct Largest {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a > b ? a : b; }
};

/// One block: experts come in groups of as many as it has threads.
__global__ void __launch_bounds__(kScanThreads)
    offsets_kernel(const int64_t* given, FirstRow first_row, TileMap map) {
  int64_t largest = 0;
  for (int64_t begin = 0; begin <= map.num_experts; begin += kScanThreads) {
    const int64_t e = begin + threadIdx.x;
    const int64_t offset = e > map.num_experts       ? 0
                           : given[e] > map.num_rows ? map.num_rows
                                                     : given[e];
    const int64_t ascending = block_inclusive_scan(offset, Largest{});
    if (e <= map.num_experts) {
      const bool moved = e == 0 && first_row == FirstRow::zero;
      map.offsets[e] = moved ? 0 : Largest{}(ascending, largest);
    }
    largest = Largest{}(largest, block_last(ascending));
  }
  __syncthreads();
  int64_t tiles_before = 0;
  for (int64_t begin = 0; begin < map.num_experts; begin += kScanThreads) {
    const int64_t e = begin + threadIdx.x;
    const int64_t rows = e < map.num_experts ? map.offsets[e + 1] - map.offsets[e] : 0;
    const int64_t tiles = (rows + map.tile_rows - 1) / map.tile_rows;
    const int64_t up_to_here = block_inclusive_scan(tiles, Sum{});
    if (e < map.num_experts) {
      map.first_tile[e] = tiles_before + up_to_here - tiles;
    }
    tiles_before += block_last(up_to_here);
  }
  if (threadIdx.x == 0) {
    map.first_tile[map.num_experts] = tiles_before;
  }
}

/// A thread finds its tile's expert, the last one that starts at or before it.
__global__ void __launch_bounds__(kThreads) tiles_kernel(TileMap map) {
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tile >= map.num_tiles) {
    return;
  }
  if (tile >= map.first_tile[map.num_experts]) {
    map.tiles[tile] = {-1, 0};
    return;
  }
  const int64_t expert = last_start_before(map.first_tile, map.num_experts, tile);
  map.tiles[tile] = {expert, map.offsets[expert] + (tile - map.first_tile[expert]) * map.tile_rows};
}

}  // namespace

void make_tile_map(Stream stream,
                   const int64_t* expert_offsets,
                   FirstRow first_row,
                   const TileMap& map) {
  launch(stream, 1, kScanThreads, 0, offsets_kernel, expert_offsets, first_row, map);
  launch(stream, (map.num_tiles + kThreads - 1) / kThreads, kThreads, 0, tiles_kernel, map);
}

}  // namespace torchmoe::cuda
