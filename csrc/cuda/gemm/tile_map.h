// Which rows belong to which expert, as the device knows it: expert_offsets made safe, and the rows
// cut into tiles of one expert each.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "cuda/stream.h"

namespace torchmoe::cuda {

/// Where the first expert's rows start.
enum class FirstRow {
  given,  // at expert_offsets[0]
  zero,   // at row 0 whatever expert_offsets says, as in every plan
};

struct TileMap {
  struct Tile {
    int64_t expert;  // negative: a tile that the bound below allows for and the data does not use
    int64_t begin;
  };

  int64_t* offsets;     // [E + 1], ascending and within [0, num_rows]
  int64_t* first_tile;  // [E + 1], the tiles before each expert's
  Tile* tiles;          // [num_tiles]
  int64_t num_experts;
  int64_t num_rows;
  int64_t tile_rows;
  /// What the sizes alone allow for.
  int64_t num_tiles;

  /// The rows of a tile end here.
  TORCHMOE_HOST_DEVICE int64_t end(const Tile& tile) const {
    const int64_t end = offsets[tile.expert + 1];
    return tile.begin + tile_rows < end ? tile.begin + tile_rows : end;
  }
};

/// How many tiles there can be: every full one, and one that is not for each expert with rows.
constexpr int64_t most_tiles(int64_t num_rows, int64_t num_experts, int64_t tile_rows) {
  return num_rows / tile_rows + (num_experts < num_rows ? num_experts : num_rows);
}

/// The last of `size` ascending starts that is at or before `place`, which is not before the first.
TORCHMOE_HOST_DEVICE inline int64_t last_start_before(const int64_t* starts,
                                                      int64_t size,
                                                      int64_t place) {
  int64_t low = 0;
  int64_t high = size;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (starts[middle] <= place ? low : high) = middle;
  }
  return low;
}

/// Fills in the map's arrays.
void make_tile_map(Stream stream,
                   const int64_t* expert_offsets,
                   FirstRow first_row,
                   const TileMap& map);

}  // namespace torchmoe::cuda
