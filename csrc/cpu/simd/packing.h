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
constexpr int64_t kMostRows = 252;  // a multiple of either kTileRows
constexpr int64_t kMostColumns = 512;
constexpr int64_t kRightBytes = 512 * 1024;
constexpr int64_t kLeftBytes = 256 * 1024;

// Packed rows and panels lie a little more than a power of two apart, which would put all of them
// into the same few lines of L1.
constexpr int64_t kSpacing = 16;

/// How a product is cut.
struct Slices {
  int64_t lanes;
  int64_t rows;     // of the left operand that are packed at a time
  int64_t columns;  // of the right
  bool is_only;     // a slice has all terms
};

/// Rows and slices of nearly equal size, so that no last one has a single row or term.
template <typename L>
Slices slices_of(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kLane = sizeof(typename L::Lane);
  m = max(m, 1);  // nothing is cut as if it were one
  n = max(n, 1);
  Slices slices{};
  // For few rows a panel is used as soon as it is packed, while it is in L1.
  slices.columns = min(n, m <= kTileRows ? kPanelWidth<L> : kMostColumns);
  const int64_t lanes = max(divide_up(k, L::kTerms), 1);
  const int64_t most_lanes =
      min(kRightBytes / kLane / round_up(slices.columns, L::kWidth), kMostLanes);
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
  return slices.lanes * round_up(slices.columns, L::kWidth);
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

/// Calls body(first column, vectors) for each panel of a slice's columns. They are as wide as the
/// kernel's tile or one vector narrower: a last panel of one vector would run at half the speed.
template <typename L, typename Body>
void for_panels(int64_t columns, const Body& body) {
  const int64_t vectors = divide_up(columns, L::kWidth);
  const int64_t panels = divide_up(vectors, kTileVectors);
  for (int64_t p = 0, first = 0; p < panels; ++p) {
    const int64_t width = vectors / panels + (p < vectors % panels ? 1 : 0);
    body(first * L::kWidth, width);
    first += width;
  }
}

/// Terms of the result's columns into panels; in the panel that starts at column j,
/// right[j * lanes + k * width + c].
template <typename L, typename T>
void pack_right_terms(const Reader<T>& rows, Range columns, Range terms, typename L::Lane* right) {
  constexpr int64_t kAhead = 8 / L::kTerms;  // lanes: packing for the memory to answer in
  const int64_t lanes = divide_up(terms.size, L::kTerms);
  for (int64_t k = 0; k < lanes; ++k) {
    const LaneRows<L, T> from(rows, terms, k);
    prefetch(LaneRows<L, T>(rows, terms, k + kAhead), columns);
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

constexpr int64_t kEight = 8;

template <typename Lane>
struct EightLanes {
  // An alias would lose the attribute, as it depends on Lane.
  typedef Lane Type __attribute__((vector_size(kEight * sizeof(Lane))));
};

/// Turns eight rows of eight lanes into its eight columns.
template <typename Eight>
inline void transpose(Eight (&rows)[kEight]) {
  Eight a[kEight];
  for (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  Eight b[kEight];
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

/// Eight lanes of a row. They may be wider than a register, which a function cannot return.
template <typename L, typename T, typename Eight>
inline void load_eight(const T* from, Eight& to) {
  if constexpr (L::template kInPlace<T>) {
    std::memcpy(&to, from, sizeof to);
  } else {
    alignas(64) typename L::Lane wide[max(kEight, L::kWidth)];
    for (int64_t i = 0; i < kEight; i += L::kWidth) {
      store(load_up_to(from + i, kEight - i), wide + i);
    }
    std::memcpy(&to, wide, sizeof to);
  }
}

/// Columns of the result, each with its terms, into the same panels.
template <typename L, typename T>
void pack_right_rows(const Reader<T>& rows, Range columns, Range terms, typename L::Lane* right) {
  using Eight = typename EightLanes<typename L::Lane>::Type;
  const int64_t lanes = divide_up(terms.size, L::kTerms);
  for_panels<L>(columns.size, [&](int64_t j, int64_t vectors) {
    const int64_t width = vectors * L::kWidth;
    // In registers of four lanes a panel's width may be no multiple of eight.
    for (int64_t c = 0; c < width; c += kEight) {
      const T* from[kEight];
      for (int64_t i = 0; i < kEight; ++i) {
        const int64_t column = j + c + i;
        from[i] = column < columns.size ? rows.row(columns.begin + column) : nullptr;
        if (column + kEight < columns.size) {
          prefetch(rows.row(columns.begin + column + kEight), terms);
        }
      }
      const int64_t bytes = min(kEight, width - c) * static_cast<int64_t>(sizeof(typename L::Lane));
      auto* to = right + j * lanes + c;
      for (int64_t k = 0; k < lanes; k += kEight) {
        const int64_t first = k * L::kTerms;
        const int64_t count = min(terms.size - first, kEight * L::kTerms);
        Eight block[kEight];
        for (int64_t i = 0; i < kEight; ++i) {
          if (from[i] == nullptr) {
            block[i] = Eight{};
          } else if (count == kEight * L::kTerms) {
            load_eight<L>(from[i] + terms.begin + first, block[i]);
          } else {
            T numbers[kEight * L::kTerms] = {};
            std::memcpy(numbers, from[i] + terms.begin + first, count * sizeof(T));
            load_eight<L>(numbers, block[i]);
          }
        }
        transpose(block);
        for (int64_t i = 0; i < min(lanes - k, kEight); ++i) {
          if (bytes == sizeof(Eight)) {
            std::memcpy(to + (k + i) * width, &block[i], sizeof(Eight));
          } else {
            std::memcpy(to + (k + i) * width, &block[i], bytes);
          }
        }
      }
    }
  });
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
