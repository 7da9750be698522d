// The matrix product: a kernel holds a tile of the result in registers while it runs along a slice of
// the sums.
//
//     for 512 columns of the result
//       for slices of up to 192 lanes
//         pack the right operand's slice into panels, as wide as a tile          (384 KB, in L2)
//         for 252 rows of the result
//           find the left operand's rows (nt, nn) or pack its terms (tn)        (192 KB, in L2)
//           for panels of the right operand                                      (36 KB, in L1)
//             for tiles down the rows
//               tile of the result += left x panel
//
// A left operand whose rows hold their terms is read where it lies, through a pointer to each row:
// rows listed by an index cost no more than others. What lies across the sums, and the whole right
// operand, would be read from as many pages as there are terms; packed it is a single stream.
//
// A panel would be used once where a few rows meet columns that hold their terms (nt): few_rows.h has
// no panel.
//
// Every sum is one chain, from its first term to its last, whatever the sizes of the result, the
// slices and the tiles are: a number of the result depends on its own row and column alone.
//
// docs/cpu_kernels.md has the measurements behind the constants.
#include "cpu/simd/product.h"

#include "cpu/simd/destination.h"
#include "cpu/simd/few_rows.h"
#include "cpu/simd/packing.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/tile_product.h"
#include "cpu/simd/vector.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

namespace {

/// A tile that is narrower than its last vector, or whose sums are rounded: by way of a buffer, in
/// which the sums go on as they do elsewhere.
template <typename L, typename To>
void multiply_by_way_of_buffer(
    MultiplyTile<L> multiply, Tile<L> tile, int64_t rows, int64_t columns, const To& destination) {
  using Sum = typename L::Sum;
  alignas(64) Sum buffer[kTileRows * kPanelWidth<L>];
  if (destination.has_earlier && columns % L::kWidth != 0) {
    std::memset(buffer, 0, sizeof buffer);
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(
          buffer + i * kPanelWidth<L>, tile.from + i * tile.from_stride, columns * sizeof(Sum));
    }
    tile.from = buffer;
    tile.from_stride = kPanelWidth<L>;
  }
  tile.to = buffer;
  tile.to_stride = kPanelWidth<L>;
  multiply(tile);
  destination.take(buffer, kPanelWidth<L>, rows, columns);
}

/// Tiles of nearly equal height, so that no last one is left with a single row.
int64_t tile_height(int64_t rows) {
  return divide_up(rows, divide_up(rows, kTileRows));
}

/// The product of a slice of the left operand and a packed one of the right.
template <typename L, bool left_by_term, typename To>
void multiply_slices(const typename L::LeftLane* const* left,
                     const typename L::Lane* right,
                     int64_t rows,
                     int64_t columns,
                     int64_t lanes,
                     const To& destination) {
  const int64_t height = tile_height(rows);
  const bool direct = destination.takes_sums();
  const auto multiply_tile_at = [&](int64_t i, int64_t j, int64_t vectors) {
    const int64_t panel_columns = min(columns - j, vectors * L::kWidth);
    const int64_t tile_rows = min(height, rows - i);
    const To to = destination.from(i, j);
    for (int64_t r = height; r < min(2 * height, rows - i); ++r) {  // the next tile
      if (direct || to.has_earlier) {
        prefetch(to.sums + r * to.sums_stride, Range{0, panel_columns});
      }
      if (!direct) {
        prefetch(to.out + r * to.out_stride, Range{0, panel_columns});
      }
    }
    const auto multiply = kKernels<L, left_by_term>.kernels[vectors - 1][tile_rows - 1];
    const Tile<L> tile{left_by_term ? left + i / height : left + i,
                       right + j * lanes,
                       lanes,
                       to.has_earlier ? to.sums : nullptr,
                       to.sums_stride,
                       to.sums,
                       to.sums_stride};
    if (direct && panel_columns == vectors * L::kWidth) {
      multiply(tile);
    } else {
      multiply_by_way_of_buffer(multiply, tile, tile_rows, panel_columns, to);
    }
  };
  // Where all panels stay in L1, rows of the result are written from end to end.
  if (lanes * columns * static_cast<int64_t>(sizeof(typename L::Lane)) <= kL1Bytes) {
    for (int64_t i = 0; i < rows; i += height) {
      for_panels<L>(columns, [&](int64_t j, int64_t vectors) { multiply_tile_at(i, j, vectors); });
    }
    return;
  }
  for_panels<L>(columns, [&](int64_t j, int64_t vectors) {
    for (int64_t i = 0; i < rows; i += height) {
      multiply_tile_at(i, j, vectors);
    }
  });
}

// ---- The product --------------------------------------------------------------------------------

/// The parts of a product's scratch.
template <typename L, typename Out>
struct Scratch {
  using Lane = typename L::Lane;
  using Sum = typename L::Sum;

  explicit Scratch(const ProductCall& call)
      : slices(slices_of<L>(call.form, call.m, call.n, call.k)),
        left(round_up(left_lanes<L>(slices), kLine)),
        right(round_up(right_lanes<L>(slices), kLine)),
        // What waits for its last slice outside of the result.
        sums(std::is_same_v<Sum, Out> || slices.is_only ? 0 : call.m * slices.columns) {}

  int64_t bytes() const {
    return (left + right) * static_cast<int64_t>(sizeof(Lane)) +
           sums * static_cast<int64_t>(sizeof(Sum));
  }

  static constexpr int64_t kLine = 64 / sizeof(Lane);
  Slices slices;
  int64_t left;
  int64_t right;
  int64_t sums;
};

template <typename L, Form form, typename Left, typename Right, typename Out>
void product_of(const ProductCall& call) {
  using Sum = typename L::Sum;
  using Lane = typename L::Lane;
  constexpr bool kLeftByTerm = form == Form::tn;
  const Reader<Left> left_reader(call.left);
  const Reader<Right> right_reader(call.right);
  const Scratch<L, Out> scratch(call);
  const Slices slices = scratch.slices;
  auto* packed_left = static_cast<Lane*>(call.scratch);
  auto* packed_right = packed_left + scratch.left;
  const typename L::LeftLane* left[kMostRows];
  const auto multiply = [&](Range columns, Range terms, const auto& destination) {
    if constexpr (is_turned_in_use<L>(form, /*rows=*/1)) {
      if (!slices.is_packed) {
        find_left_rows<L>(left_reader, Range{0, call.m}, terms, packed_left, left);
        return multiply_few_rows<L>(
            left, call.m, right_reader, columns, terms, call.n, destination);
      }
    }
    if constexpr (form == Form::nt) {
      pack_right_rows<L>(right_reader, columns, terms, call.n, packed_right);
    } else {
      pack_right_terms<L>(right_reader, columns, terms, call.k, packed_right);
    }
    for (int64_t i = 0; i < call.m; i += slices.rows) {
      const Range rows{i, min(slices.rows, call.m - i)};
      if constexpr (kLeftByTerm) {
        pack_left_terms<L>(left_reader, rows, terms, tile_height(rows.size), packed_left, left);
      } else {
        find_left_rows<L>(left_reader, rows, terms, packed_left, left);
      }
      multiply_slices<L, kLeftByTerm>(left,
                                      packed_right,
                                      rows.size,
                                      columns.size,
                                      divide_up(terms.size, L::kTerms),
                                      destination.from(i, 0));
    }
  };
  auto* waiting = reinterpret_cast<Sum*>(packed_right + scratch.right);
  for_slices<Sum, Right, Out>(call, slices.columns, slices.lanes * L::kTerms, waiting, multiply);
}

/// Calls body.template operator()<lanes, left, right, out>() with the types of a product.
template <typename Body>
auto with_types(const ProductCall& call, const Body& body) {
  const auto with_out = [&]<typename L, typename Left, typename Right>() {
    if (call.out.type == Element::float32) {
      return body.template operator()<L, Left, Right, float>();
    }
    return body.template operator()<L, Left, Right, Right>();
  };
  const auto with_left = [&]<typename Right>() {
    if (call.left.numbers.type == Element::float32) {
      return with_out.template operator()<Singles<float>, float, Right>();
    }
#if defined(TORCHMOE_HAS_PAIRS) && !defined(TORCHMOE_TILES)
    if constexpr (std::is_same_v<Right, BFloat16>) {
      return with_out.template operator()<Pairs, Right, Right>();
    }
#endif
    return with_out.template operator()<Singles<float>, Right, Right>();
  };
#define TORCHMOE_CASE(name, stored, ...) \
  case Element::name:                    \
    return with_left.template operator()<stored>();
  switch (call.right.numbers.type) {
    TORCHMOE_FLOAT32_ELEMENTS(TORCHMOE_CASE)
    case Element::float64:
      return body.template operator()<Singles<double>, double, double, double>();
  }
#undef TORCHMOE_CASE
  __builtin_unreachable();
}

}  // namespace

int64_t product_scratch(const ProductCall& call) {
#if defined(TORCHMOE_TILES)
  if (is_on_tiles(call)) {
    return tile_product_scratch(call);
  }
#endif
  return with_types(call, [&]<typename L, typename Left, typename Right, typename Out>() {
    return Scratch<L, Out>(call).bytes();
  });
}

void product(const ProductCall& call) {
  if (call.m == 0) {
    return;  // an operand of no rows may have no data, and the other one need not be packed
  }
#if defined(TORCHMOE_TILES)
  if (is_on_tiles(call)) {
    return tile_product(call);
  }
#endif
  with_types(call, [&]<typename L, typename Left, typename Right, typename Out>() {
    switch (call.form) {
      case Form::nt:
        return product_of<L, Form::nt, Left, Right, Out>(call);
      case Form::nn:
        return product_of<L, Form::nn, Left, Right, Out>(call);
      case Form::tn:
        return product_of<L, Form::tn, Left, Right, Out>(call);
    }
  });
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
