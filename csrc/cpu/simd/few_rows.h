// The product of a few rows with columns that hold their terms (form nt): a square of the columns'
// terms is multiplied as soon as it is turned over, while it is in registers and the next ones are
// on their way. A panel that is used once would be stored and loaded for it, and the memory would
// wait meanwhile.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/lanes.h"
#include "cpu/simd/packing.h"
#include "cpu/simd/sizes.h"
#include "cpu/simd/tile.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

/// As many columns as a square has, and what they are multiplied with and added to.
template <typename L, typename T>
struct SquareColumns {
  const typename L::LeftLane* const* left;  // of each row its lanes
  const SquareRows<L, T>& rows;             // of each column its terms
  int64_t terms;
  typename L::Sum* sums;  // [rows, kWidth], which go on
};

/// The last lanes, fewer than a square has.
template <typename L, typename T>
void multiply_end(const SquareColumns<L, T>& columns, int64_t rows, int64_t lane) {
  const int64_t first = lane * L::kTerms;
  const int64_t count = divide_up(columns.terms - first, L::kTerms);
  alignas(64) typename L::Lane turned[L::kWidth][L::kWidth];
  for (int64_t c = 0; c < L::kWidth; ++c) {
    alignas(64) typename L::Lane lanes[2 * L::kWidth];
    copy_row<L>(columns.rows.from[c] + first, columns.terms - first, lanes);
    for (int64_t k = 0; k < count; ++k) {
      turned[k][c] = lanes[k];
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    auto* to = columns.sums + r * L::kWidth;
    typename L::Sums sums = load(to);
    for (int64_t k = 0; k < count; ++k) {
      sums =
          L::multiply_add(sums, columns.left[r][lane + k], load_bits<typename L::Lanes>(turned[k]));
    }
    store(sums, to);
  }
}

/// The whole squares.
template <typename L, int rows, typename T>
void multiply_squares(const SquareColumns<L, T>& columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int64_t kTerms = L::kWidth * L::kTerms;
  typename L::Sums sums[rows];
  const typename L::LeftLane* left[rows];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    sums[r] = load(columns.sums + r * L::kWidth);
    left[r] = columns.left[r];
  }
  for (int64_t term = 0; term + kTerms <= columns.terms; term += kTerms) {
    Side<L> square[L::kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < L::kWidth; ++i) {
      load_side<L>(columns.rows.from[i] + term, square[i]);
    }
    if (term % kLine == 0) {
      for (const T* row : columns.rows.next) {
        __builtin_prefetch(row + term);
      }
    }
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < L::kWidth; ++i) {
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const auto lane = left[r][term / L::kTerms + i];
        sums[r] = L::multiply_add(sums[r], lane, reinterpret_cast<typename L::Lanes>(square[i]));
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    store(sums[r], columns.sums + r * L::kWidth);
  }
}

/// All terms, by the kernel for the number of rows, which is at most `most`.
template <typename L, int most, typename T>
void multiply_columns(const SquareColumns<L, T>& columns, int64_t rows) {
  if constexpr (most > 0) {
    if (rows < most) {
      return multiply_columns<L, most - 1>(columns, rows);
    }
    multiply_squares<L, most>(columns);
    const int64_t lane = columns.terms / (L::kWidth * L::kTerms) * L::kWidth;
    if (lane * L::kTerms < columns.terms) {
      multiply_end(columns, rows, lane);
    }
  }
}

/// A slice of the terms of a few rows with a slice of the columns. `num_columns` are all that the
/// product has.
template <typename L, typename T, typename To>
void multiply_few_rows(const typename L::LeftLane* const* left,
                       int64_t rows,
                       const Reader<T>& right,
                       Range columns,
                       Range terms,
                       int64_t num_columns,
                       const To& destination) {
  static_assert(kSide<L> == L::kWidth);
  constexpr int64_t kColumns = L::kWidth;
  for (int64_t j = 0; j < columns.size; j += kColumns) {
    const int64_t count = min(kColumns, columns.size - j);
    alignas(64) typename L::Sum sums[kTileRows * kColumns] = {};
    const To to = destination.from(0, j);
    if (to.has_earlier) {
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(
            sums + r * kColumns, to.sums + r * to.sums_stride, count * sizeof(typename L::Sum));
      }
    }
    const SquareRows<L, T> of(right, columns, terms, j, num_columns);
    multiply_columns<L, kTileRows>(SquareColumns<L, T>{left, of, terms.size, sums}, rows);
    to.take(sums, kColumns, rows, count);
  }
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
