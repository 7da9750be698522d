// A tile map's memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "cuda/gemm/tile_map.h"

namespace torchmoe::cuda {

/// The map over num_rows rows of `expert_offsets` [E + 1], made on `stream`.
class TileMapTensors {
 public:
  TileMapTensors(Stream stream,
                 const at::Tensor& expert_offsets,
                 int64_t num_rows,
                 int64_t tile_rows,
                 FirstRow first_row) {
    const auto given = expert_offsets.contiguous();
    const int64_t num_experts = given.numel() - 1;
    const int64_t num_tiles = most_tiles(num_rows, num_experts, tile_rows);
    constexpr int64_t kTileNumbers = sizeof(TileMap::Tile) / sizeof(int64_t);
    numbers_ =
        at::empty({2 * (num_experts + 1) + kTileNumbers * num_tiles}, expert_offsets.options());
    auto* data = numbers_.mutable_data_ptr<int64_t>();
    map_ = {data,
            data + num_experts + 1,
            reinterpret_cast<TileMap::Tile*>(data + 2 * (num_experts + 1)),
            num_experts,
            num_rows,
            tile_rows,
            num_tiles};
    make_tile_map(stream, given.const_data_ptr<int64_t>(), first_row, map_);
  }

  const TileMap& map() const { return map_; }

 private:
  at::Tensor numbers_;
  TileMap map_{};
};

}  // namespace torchmoe::cuda
