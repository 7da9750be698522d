// An operand's slice as the tile reads it: rows in place where they are lanes as they lie, and
// otherwise packed.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/lanes.h"
#include "cpu/simd/sizes.h"
#include "cpu/simd/tile.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

// A slice of the right operand lies in half of an L2 of 1 MB, one of the left in a quarter. Its lanes
// are as many as fit then: the sums are loaded and stored once for each slice.
constexpr int64_t kMostLanes = 512;
// What is used as soon as it is packed, while it is in L1.
constexpr int64_t kL1Bytes = int64_t{24} * 1024;
constexpr int64_t kMostRows = 252;  // a multiple of every kTileRows
constexpr int64_t kMostColumns = 512;
constexpr int64_t kRightBytes = int64_t{512} * 1024;
constexpr int64_t kLeftBytes = int64_t{256} * 1024;

// Packed rows and panels lie a little more than a power of two apart, which would put all of them
// into the same few lines of L1.
constexpr int64_t kSpacing = 16;

/// Rows and columns of a square of lanes that is turned over in registers.
template <typename L>
constexpr int64_t kSide = sizeof(typename L::Lane) == 4 ? max(L::kWidth, 8) : 8;

/// Whether so few rows are multiplied by a square as soon as it is turned over: where its rows are
/// vectors. A panel of it would be used once.
template <typename L>
constexpr bool is_turned_in_use(Form form, int64_t rows) {
  return form == Form::nt && rows <= kTileRows && kSide<L> == L::kWidth;
}

/// How a product is cut.
struct Slices {
  int64_t lanes;
  int64_t rows;     // of the left operand that are packed at a time
  int64_t columns;  // of the right
  bool is_only;     // a slice has all terms
  bool is_packed;   // the right one's, and not multiplied as it is read
};

/// Rows and slices of nearly equal size, so that no last one has a single row or term.
template <typename L>
Slices slices_of(Form form, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kLane = sizeof(typename L::Lane);
  m = max(m, 1);  // nothing is cut as if it were one
  n = max(n, 1);
  Slices slices{};
  const bool is_few = m <= kTileRows;
  slices.is_packed = !is_turned_in_use<L>(form, m);
  const bool is_by_panel = is_few && form == Form::nt && slices.is_packed;
  slices.columns = min(n, is_by_panel ? kPanelWidth<L> : kMostColumns);
  const int64_t lanes = max(divide_up(k, L::kTerms), 1);
  const int64_t bytes = is_few ? kL1Bytes : kRightBytes;
  const int64_t packed_lanes = bytes / kLane / round_up(slices.columns, L::kWidth);
  const int64_t most_lanes = slices.is_packed ? min(packed_lanes, kMostLanes) : kMostLanes;
  const int64_t count = divide_up(lanes, most_lanes);
  slices.lanes = divide_up(lanes, count);
  slices.is_only = count == 1;
  const int64_t most_rows =
      min(kLeftBytes / kLane / slices.lanes / kTileRows * kTileRows, kMostRows);
  slices.rows = round_up(divide_up(m, divide_up(m, most_rows)), kTileRows);
  return slices;
}

/// How many lanes the slices take, their spacing and the vectors that overlap an end included.
template <typename L>
int64_t left_lanes(const Slices& slices) {
  return (slices.lanes + kSpacing) * (slices.rows + 1) + L::kWidth;
}
template <typename L>
int64_t right_lanes(const Slices& slices) {
  return slices.is_packed ? slices.lanes * round_up(slices.columns, L::kWidth) : 0;
}

// What a row of zeros is read from.
alignas(64) constexpr double kZeros[kMostLanes] = {};

/// The rows of an operand, read as T.
template <typename T>
class Reader {
 public:
  explicit Reader(const NumberRows& rows)
      : data_(static_cast<const T*>(rows.numbers.data)), stride_(rows.stride), index_(rows.index) {}

  /// Row i, null for a row of zeros.
  const T* row(int64_t i) const {
    if (index_ == nullptr) {
      return data_ + i * stride_;
    }
    return index_[i] < 0 ? nullptr : data_ + index_[i] * stride_;
  }

 private:
  const T* data_;
  int64_t stride_;
  const int64_t* index_;
};

/// Asks for a row's numbers before they are needed.
template <typename T>
void prefetch(const T* row, Range numbers) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; row != nullptr && i < numbers.size; i += kLine) {
    __builtin_prefetch(row + numbers.begin + i);
  }
}

// ---- The left operand ---------------------------------------------------------------------------

/// The terms of a row as lanes, in a place of their own; the last lane's missing terms are 0.
template <typename L, typename T>
void copy_row(const T* from, int64_t terms, typename L::Lane* to) {
  if constexpr (L::template kInPlace<T>) {
    to[terms / L::kTerms] = 0;
    std::memcpy(to, from, terms * sizeof(T));
  } else {
    for (int64_t k = 0; k < terms; k += L::kWidth) {
      store(load_up_to(from + k, terms - k), to + k);
    }
  }
}

/// Rows of the result, each with its terms: pointers[i] to the lanes of row i, which `copies` takes
/// where they are not lanes as they lie.
template <typename L, typename T>
void find_left_rows(const Reader<T>& reader,
                    Range rows,
                    Range terms,
                    typename L::Lane* copies,
                    const typename L::LeftLane** pointers) {
  const int64_t stride = divide_up(terms.size, L::kTerms) + kSpacing;
  using LeftLane = typename L::LeftLane;
  for (int64_t i = 0; i < rows.size; ++i) {
    const T* from = reader.row(rows.begin + i);
    if (from == nullptr) {
      pointers[i] = reinterpret_cast<const LeftLane*>(kZeros);
    } else if (L::template kInPlace<T> && terms.size % L::kTerms == 0) {
      pointers[i] = reinterpret_cast<const LeftLane*>(from + terms.begin);
    } else {
      auto* to = copies + i * stride;
      copy_row<L>(from + terms.begin, terms.size, to);
      pointers[i] = to;
    }
  }
}

/// The rows of a lane's terms, null where there is none.
template <typename L, typename T>
struct LaneRows {
  LaneRows() = default;
  LaneRows(const Reader<T>& reader, Range terms, int64_t lane) {
    for (int64_t t = 0; t < L::kTerms; ++t) {
      const int64_t term = lane * L::kTerms + t;
      rows[t] = term < terms.size ? reader.row(terms.begin + term) : nullptr;
    }
  }
  const T* rows[L::kTerms];
};

template <typename L, typename T>
void prefetch(const LaneRows<L, T>& lane, Range numbers) {
  for (const T* row : lane.rows) {
    prefetch(row, numbers);
  }
}

// So many lanes of a panel are written one after the other. A row is read in one go for all panels,
// since the next row may be on another page.
constexpr int64_t kLanesTogether = 8;

/// Terms, each of all rows of the result: panels of `height` rows, panel[k * kTileRows + i], and
/// pointers[p] to panel p. A lane's rows are stored as whole vectors, whose end the next ones
/// overwrite.
template <typename L, typename T>
void pack_left_terms(const Reader<T>& reader,
                     Range rows,
                     Range terms,
                     int64_t height,
                     typename L::Lane* packed,
                     const typename L::LeftLane** pointers) {
  const int64_t lanes = divide_up(terms.size, L::kTerms);
  const int64_t panel = lanes * kTileRows + kSpacing;
  for (int64_t p = 0; p * height < rows.size; ++p) {
    pointers[p] = packed + p * panel;
  }
  for (int64_t first = 0; first < lanes; first += kLanesTogether) {
    const int64_t count = min(kLanesTogether, lanes - first);
    LaneRows<L, T> from[kLanesTogether];
    for (int64_t k = 0; k < count; ++k) {
      from[k] = LaneRows<L, T>(reader, terms, first + k);
      prefetch(LaneRows<L, T>(reader, terms, first + k + kLanesTogether), rows);
    }
    auto* to = packed + first * kTileRows;
    for (int64_t i = 0; i < rows.size; i += height, to += panel) {
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t r = 0; r < height; r += L::kWidth) {
          const auto v = L::across(from[k].rows, rows.begin + i + r, max(rows.size - i - r, 0));
          std::memcpy(to + k * kTileRows + r, &v, sizeof v);
        }
      }
    }
  }
}

// ---- Packing the right operand ------------------------------------------------------------------

/// A panel has up to kPanelUnits units of so many columns, and its lanes come in blocks; the last
/// block's missing lanes are 0.
template <typename L>
constexpr int64_t kPanelUnit = L::kWidth;
template <typename L>
constexpr int64_t kPanelUnits = kTileVectors;
template <typename L>
constexpr int64_t kLaneBlock = 1;

/// How many lanes a panel has.
template <typename L>
constexpr int64_t panel_lanes(Range terms) {
  return divide_up(terms.size, L::kTerms * kLaneBlock<L>) * kLaneBlock<L>;
}

/// Calls body(first column, vectors) for each panel of a slice's columns. They are as wide as the
/// kernel's tile or one unit narrower: a last panel of one vector would run at half the speed.
template <typename L, typename Body>
void for_panels(int64_t columns, const Body& body) {
  const int64_t units = divide_up(columns, kPanelUnit<L>);
  const int64_t panels = divide_up(units, kPanelUnits<L>);
  for (int64_t p = 0, first = 0; p < panels; ++p) {
    const int64_t width = units / panels + (p < units % panels ? 1 : 0);
    body(first * kPanelUnit<L>, width * (kPanelUnit<L> / L::kWidth));
    first += width;
  }
}

/// Terms of the result's columns into panels; in the panel that starts at column j,
/// right[j * lanes + k * width + c]. `num_terms` are all that the product has: the next ones are asked
/// of the memory while these are packed.
template <typename L, typename T>
void pack_right_terms(
    const Reader<T>& rows, Range columns, Range terms, int64_t num_terms, typename L::Lane* right) {
  constexpr int64_t kAhead = 16 / L::kTerms;  // lanes: packing for the memory to answer in
  const int64_t lanes = panel_lanes<L>(terms);
  const Range terms_left{terms.begin, num_terms - terms.begin};
  for (int64_t k = 0; k < lanes; ++k) {
    const LaneRows<L, T> from(rows, terms, k);
    prefetch(LaneRows<L, T>(rows, terms_left, k + kAhead), columns);
    for_panels<L>(columns.size, [&](int64_t j, int64_t vectors) {
      auto* to = right + j * lanes + k * vectors * L::kWidth;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t column = j + v * L::kWidth;
        const auto packed =
            L::across(from.rows, columns.begin + column, max(columns.size - column, 0));
        std::memcpy(to + v * L::kWidth, &packed, sizeof packed);
      }
    });
  }
}

template <typename Lane, int64_t side>
struct SideOf {
  // An alias would lose the attribute, as it depends on Lane.
  typedef Lane Type __attribute__((vector_size(side * sizeof(Lane))));
};

/// A row of the square, which may be wider than a register.
template <typename L>
using Side = typename SideOf<typename L::Lane, kSide<L>>::Type;

/// Turns rows into columns: pairs of lanes, pairs of pairs, then the fours.
template <typename V>
inline void transpose(V (&rows)[8]) {
  V a[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  V b[8];
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] =
          __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// clang-format off
template <typename V>
inline void transpose(V (&rows)[16]) {
  V a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = __builtin_shufflevector(
        rows[i], rows[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    a[i + 1] = __builtin_shufflevector(
        rows[i], rows[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  V b[16];
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = __builtin_shufflevector(
          a[i + j], a[i + j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      b[i + 2 * j + 1] = __builtin_shufflevector(
          a[i + j], a[i + j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  const auto even = [](V x, V y) {
    return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  const auto odd = [](V x, V y) {
    return __builtin_shufflevector(
        x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  for (int i = 0; i < 4; ++i) {
    const V low_even = even(b[i], b[i + 4]);
    const V low_odd = odd(b[i], b[i + 4]);
    const V high_even = even(b[i + 8], b[i + 12]);
    const V high_odd = odd(b[i + 8], b[i + 12]);
    rows[i] = even(low_even, high_even);
    rows[i + 4] = even(low_odd, high_odd);
    rows[i + 8] = odd(low_even, high_even);
    rows[i + 12] = odd(low_odd, high_odd);
  }
}
// clang-format on

/// A side's lanes of a row. They may be wider than a register, which a function cannot return.
template <typename L, typename T>
inline void load_side(const T* from, Side<L>& to) {
  if constexpr (L::template kInPlace<T>) {
    std::memcpy(&to, from, sizeof to);
  } else {
    alignas(64) typename L::Lane wide[kSide<L>];
    for (int64_t i = 0; i < kSide<L>; i += L::kWidth) {
      store(load(from + i), wide + i);
    }
    std::memcpy(&to, wide, sizeof to);
  }
}

/// The rows that a square's columns are, from the first of the terms: zeros past the slice's columns
/// and where there is none, and those after them of the `num_columns` that the product has.
template <typename L, typename T>
struct SquareRows {
  SquareRows(
      const Reader<T>& rows, Range columns, Range terms, int64_t first, int64_t num_columns) {
    for (int64_t i = 0; i < kSide<L>; ++i) {
      const int64_t column = columns.begin + first + i;
      const auto row_or = [&](int64_t place, int64_t end, const T* none) {
        const T* row = place < end ? rows.row(place) : nullptr;
        return row == nullptr ? none : row + terms.begin;
      };
      from[i] = row_or(column, columns.begin + columns.size, reinterpret_cast<const T*>(kZeros));
      next[i] = row_or(column + kSide<L>, num_columns, from[i]);
    }
  }

  const T* from[kSide<L>];
  const T* next[kSide<L>];
};

/// Columns of the result, each with its terms, into the same panels. `num_columns` are all that the
/// product has: the next ones are asked of the memory while these are turned over.
template <typename L, typename T>
void pack_right_rows(const Reader<T>& rows,
                     Range columns,
                     Range terms,
                     int64_t num_columns,
                     typename L::Lane* right) {
  constexpr int64_t kLanes = kSide<L>;
  constexpr int64_t kElements = kLanes * L::kTerms;
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t lanes = panel_lanes<L>(terms);
  for_panels<L>(columns.size, [&](int64_t j, int64_t vectors) {
    const int64_t width = vectors * L::kWidth;
    for (int64_t c = 0; c < width; c += kLanes) {
      const SquareRows<L, T> of(rows, columns, terms, j + c, num_columns);
      const int64_t bytes = min(kLanes, width - c) * static_cast<int64_t>(sizeof(typename L::Lane));
      auto* to = right + j * lanes + c;
      for (int64_t k = 0; k < lanes; k += kLanes) {
        const int64_t first = k * L::kTerms;
        const int64_t count = max(min(terms.size - first, kElements), 0);
        // One way through the registers, for an end, too: two would meet in memory.
        const T* const* source = of.from;
        int64_t offset = first;
        T ends[kLanes][kElements];
        const T* end_rows[kLanes];
        if (count < kElements) {
          std::memset(ends, 0, sizeof ends);
          for (int64_t i = 0; i < kLanes; ++i) {
            std::memcpy(ends[i], of.from[i] + first, count * sizeof(T));
            end_rows[i] = ends[i];
          }
          source = end_rows;
          offset = 0;
        }
        Side<L> square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          load_side<L>(source[i] + offset, square[i]);
        }
        if (first % kLine == 0) {
          for (int64_t i = 0; i < kLanes; ++i) {
            __builtin_prefetch(of.next[i] + first);
          }
        }
        transpose(square);
        const int64_t whole = min(lanes - k, kLanes);
        if (whole == kLanes && bytes == sizeof(Side<L>)) {
          for (int64_t i = 0; i < kLanes; ++i) {
            std::memcpy(to + (k + i) * width, &square[i], sizeof(Side<L>));
          }
        } else {
          for (int64_t i = 0; i < whole; ++i) {
            std::memcpy(to + (k + i) * width, &square[i], bytes);
          }
        }
      }
    }
  });
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
