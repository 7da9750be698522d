// The matrix product of bfloat16 operands on tile registers, 2 x 2 tiles of the result at a time.
//
// The loops are those of product.cpp, and so are the panels of the right operand: two tiles wide; a
// lane of two terms is what a row of a tile has 16 of. A tile of the left operand is read where it
// lies if its rows are a stride apart, all of them there, and their terms fill whole blocks of 32;
// otherwise it is packed.
//
// A number of the result depends on its own row and column alone: its terms are taken in blocks of
// 32 from the first one on, each a sum of its own that is added to those before it. Slices have
// whole blocks.
#include "cpu/simd/tile_product.h"

#include <cstring>

#include "cpu/simd/destination.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/packing.h"
#include "cpu/simd/sizes.h"

#include TORCHMOE_TILES

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

template <>
constexpr int64_t kPanelUnit<PairsAsLanes> = kTileSize;
template <>
constexpr int64_t kPanelUnits<PairsAsLanes> = 2;
template <>
constexpr int64_t kLaneBlock<PairsAsLanes> = kTileSize;

namespace {

using L = PairsAsLanes;

constexpr int64_t kBlockTiles = 16;  // one below another, that are multiplied by a panel
constexpr int64_t kBlockRows = kBlockTiles * kTileSize;
constexpr int64_t kPanelColumns = 2 * kTileSize;
// A panel (32 KB) stays in L1, a slice of either operand (512 KB and 272 KB) in an L2 of 2 MB.
constexpr int64_t kSliceLanes = 256;
static_assert(kSliceLanes % kTileSize == 0 && kMostColumns % kPanelColumns == 0);

/// How a product is cut, and the parts of its scratch.
struct Cut {
  explicit Cut(const ProductCall& call)
      // Tiles and slices of nearly equal size.
      : height(divide_up(call.m, max(divide_up(call.m, kTileSize), 1))),
        columns(min(call.n, kMostColumns)) {
    const int64_t blocks = max(divide_up(call.k, L::kTerms * kTileSize), 1);
    const int64_t slices = divide_up(blocks * kTileSize, kSliceLanes);
    lanes = divide_up(blocks, slices) * kTileSize;
    left = divide_up(min(call.m, kBlockRows), max(height, 1)) * kTileSize * (lanes + kSpacing);
    right = round_up(columns, kPanelColumns) * lanes;
    // What waits for its last slice outside of the result.
    sums = call.out.type == Element::float32 || slices == 1 ? 0 : call.m * columns;
  }

  int64_t bytes() const { return (left + right + sums) * static_cast<int64_t>(sizeof(uint32_t)); }

  int64_t height;   // of a tile; kTileSize where there are several blocks of rows
  int64_t columns;  // of the right operand that are packed at a time
  int64_t lanes;    // of a slice
  int64_t left;
  int64_t right;
  int64_t sums;
};

/// Rows of the left operand, of which a tile is read.
struct LeftTile {
  const void* data;
  int64_t stride;  // bytes
};

// ---- The left operand ---------------------------------------------------------------------------

/// Tiles of rows that hold their terms.
void find_left_tiles(const ProductCall& call,
                     Range rows,
                     Range terms,
                     int64_t height,
                     uint32_t* packed,
                     LeftTile* tiles) {
  const Reader<BFloat16> reader(call.left);
  const int64_t lanes = panel_lanes<L>(terms), stride = lanes + kSpacing;
  const bool in_place = call.left.index == nullptr && terms.size == lanes * L::kTerms;
  for (int64_t i = 0; i < rows.size; i += height, ++tiles, packed += kTileSize * stride) {
    if (in_place && rows.size - i >= height) {
      *tiles = {reader.row(rows.begin + i) + terms.begin,
                call.left.stride * static_cast<int64_t>(sizeof(BFloat16))};
      continue;
    }
    for (int64_t r = 0; r < height; ++r) {
      auto* to = reinterpret_cast<char*>(packed + r * stride);
      const BFloat16* from = i + r < rows.size ? reader.row(rows.begin + i + r) : nullptr;
      const int64_t bytes = from == nullptr ? 0 : terms.size * static_cast<int64_t>(sizeof *from);
      if (bytes > 0) {
        std::memcpy(to, from + terms.begin, bytes);
      }
      std::memset(to + bytes, 0, lanes * sizeof(uint32_t) - bytes);
    }
    *tiles = {packed, stride * static_cast<int64_t>(sizeof(uint32_t))};
  }
}

/// Tiles of rows that hold a term of every sum: 16 lanes of 16 rows of the result are put side by
/// side and turned.
void pack_left_tiles(const ProductCall& call,
                     Range rows,
                     Range terms,
                     int64_t height,
                     uint32_t* packed,
                     LeftTile* tiles) {
  constexpr int64_t kLanes = kSide<L>;
  const Reader<BFloat16> reader(call.left);
  const int64_t lanes = panel_lanes<L>(terms), stride = lanes + kSpacing;
  for (int64_t k = 0; k < lanes; k += kTileSize) {
    auto* tile = packed;
    for (int64_t i = 0; i < rows.size; i += height, tile += kTileSize * stride) {
      alignas(64) uint32_t across[kTileSize][kTileSize];
      for (int64_t l = 0; l < kTileSize; ++l) {
        const LaneRows<L, BFloat16> from(reader, terms, k + l);
        for (int64_t r = 0; r < kTileSize; r += L::kWidth) {
          const auto v = L::across(from.rows, rows.begin + i + r, max(rows.size - i - r, 0));
          std::memcpy(&across[l][r], &v, sizeof v);
        }
      }
      for (int64_t l = 0; l < kTileSize; l += kLanes) {
        for (int64_t r = 0; r < kTileSize; r += kLanes) {
          Side<L> square[kLanes];
          for (int64_t e = 0; e < kLanes; ++e) {
            std::memcpy(&square[e], &across[l + e][r], sizeof(Side<L>));
          }
          transpose(square);
          for (int64_t e = 0; e < kLanes; ++e) {
            std::memcpy(tile + (r + e) * stride + k + l, &square[e], sizeof(Side<L>));
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < rows.size; i += height, packed += kTileSize * stride) {
    *tiles++ = {packed, stride * static_cast<int64_t>(sizeof(uint32_t))};
  }
}

// ---- Multiplying --------------------------------------------------------------------------------

/// Up to 2 x 2 tiles of the result: where their sums come from and go to.
struct TileSums {
  const float* from;  // null: there are none
  int64_t from_stride;
  float* to;
  int64_t to_stride;
};

/// Calls body.template operator()<i, j>() for each tile of the sums.
template <int rows, int columns, typename Body>
void for_tiles(const Body& body) {
  body.template operator()<0, 0>();
  if constexpr (columns > 1) {
    body.template operator()<0, 1>();
  }
  if constexpr (rows > 1) {
    body.template operator()<1, 0>();
    if constexpr (columns > 1) {
      body.template operator()<1, 1>();
    }
  }
}

template <int rows, int columns>
void multiply_tiles(Tiles& tiles,
                    const LeftTile* left,
                    const uint32_t* right,
                    int64_t lanes,
                    int64_t height,
                    const TileSums& sums) {
  constexpr int64_t kBytes = sizeof(uint32_t);
  constexpr int64_t kWidth = columns * kTileSize;
  const auto place = [&](int i, int j, int64_t stride) {
    return i * height * stride + j * kTileSize;
  };
  for_tiles<rows, columns>([&]<int i, int j>() {
    if (sums.from == nullptr) {
      tiles.clear_sums<i, j>();
    } else {
      tiles.load_sums<i, j>(sums.from + place(i, j, sums.from_stride), sums.from_stride * kBytes);
    }
  });
  for (int64_t k = 0; k < lanes; k += kTileSize, right += kTileSize * kWidth) {
    const auto load_left = [&]<int i>() {
      tiles.load_left<i>(static_cast<const char*>(left[i].data) + k * kBytes, left[i].stride);
    };
    load_left.template operator()<0>();
    tiles.load_right<0>(right, kWidth * kBytes);
    if constexpr (columns > 1) {
      tiles.load_right<1>(right + kTileSize, kWidth * kBytes);
    }
    if constexpr (rows > 1) {
      load_left.template operator()<1>();
    }
    for_tiles<rows, columns>([&]<int i, int j>() { tiles.multiply_add<i, j>(); });
  }
  for_tiles<rows, columns>([&]<int i, int j>() {
    tiles.store_sums<i, j>(sums.to + place(i, j, sums.to_stride), sums.to_stride * kBytes);
  });
}

/// Tiles that reach beyond the result's rows or columns, or whose sums are rounded: by way of a
/// buffer, in which the sums go on as they do elsewhere.
template <typename Multiply, typename To>
void multiply_by_way_of_buffer(
    const Multiply& multiply, bool is_full, int64_t rows, int64_t columns, const To& to) {
  alignas(64) float buffer[kPanelColumns * kPanelColumns];
  TileSums sums{to.has_earlier ? to.sums : nullptr, to.sums_stride, buffer, kPanelColumns};
  if (to.has_earlier && !is_full) {
    std::memset(buffer, 0, sizeof buffer);
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(
          buffer + i * kPanelColumns, to.sums + i * to.sums_stride, columns * sizeof(float));
    }
    sums.from = buffer;
    sums.from_stride = kPanelColumns;
  }
  multiply(sums);
  to.take(buffer, kPanelColumns, rows, columns);
}

/// The product of a slice of the left operand and a packed one of the right.
template <typename To>
void multiply_slices(Tiles& registers,
                     const LeftTile* left,
                     const uint32_t* right,
                     int64_t rows,
                     int64_t columns,
                     int64_t lanes,
                     int64_t height,
                     const To& destination) {
  const bool direct = destination.takes_sums();
  for_panels<L>(columns, [&](int64_t j, int64_t vectors) {
    const int64_t width = vectors * L::kWidth;
    const int64_t panel_columns = min(columns - j, width);
    for (int64_t i = 0; i < rows; i += 2 * height) {
      const int64_t panel_rows = min(2 * height, rows - i);
      const bool is_tall = panel_rows > height, is_wide = width > kTileSize;
      const auto kernel = is_tall ? (is_wide ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                  : (is_wide ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
      const auto multiply = [&](const TileSums& sums) {
        kernel(registers, left + i / height, right + j * lanes, lanes, height, sums);
      };
      const bool is_full = panel_columns == width && panel_rows % height == 0;
      const To to = destination.from(i, j);
      if (direct && is_full) {
        multiply({to.has_earlier ? to.sums : nullptr, to.sums_stride, to.sums, to.sums_stride});
      } else {
        multiply_by_way_of_buffer(multiply, is_full, panel_rows, panel_columns, to);
      }
    }
  });
}

// ---- The product --------------------------------------------------------------------------------

template <typename Out>
void product_of(const ProductCall& call) {
  const Reader<BFloat16> right_reader(call.right);
  const Cut cut(call);
  auto* packed_left = static_cast<uint32_t*>(call.scratch);
  auto* packed_right = packed_left + cut.left;
  LeftTile left[kBlockTiles];
  Tiles registers(cut.height);
  const auto multiply = [&](Range columns, Range terms, const auto& destination) {
    if (call.form == Form::nt) {
      pack_right_rows<L>(right_reader, columns, terms, call.n, packed_right);
    } else {
      pack_right_terms<L>(right_reader, columns, terms, call.k, packed_right);
    }
    for (int64_t i = 0; i < call.m; i += kBlockRows) {
      const Range rows{i, min(kBlockRows, call.m - i)};
      const auto tiles_of = call.form == Form::tn ? pack_left_tiles : find_left_tiles;
      tiles_of(call, rows, terms, cut.height, packed_left, left);
      multiply_slices(registers,
                      left,
                      packed_right,
                      rows.size,
                      columns.size,
                      panel_lanes<L>(terms),
                      cut.height,
                      destination.from(i, 0));
    }
  };
  auto* waiting = reinterpret_cast<float*>(packed_right + cut.right);
  for_slices<float, BFloat16, Out>(call, cut.columns, cut.lanes * L::kTerms, waiting, multiply);
}

}  // namespace

int64_t tile_product_scratch(const ProductCall& call) {
  return Cut(call).bytes();
}

void tile_product(const ProductCall& call) {
  call.out.type == Element::float32 ? product_of<float>(call) : product_of<BFloat16>(call);
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
