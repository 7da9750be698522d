// The innermost loop: a tile of the result stays in registers while it runs along the terms.
#pragma once

#include <cstdint>

#include "cpu/simd/lanes.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

// The tile is as large as the registers allow: rows x vectors of sums, the panel's vectors and one
// lane of the left operand at a time. Of 32 registers 9 x 3 need 31, of 16 registers 6 x 2 need
// 15. Each step loads rows + vectors lanes for rows * vectors multiply-adds, so that the loads
// (two a cycle, as the multiply-adds) are never what the step waits for. On aarch64 a lane of the
// left operand takes a register until it is multiplied, and the compiler loads them early: with
// 9 x 3 or 6 x 4 sums it keeps some of these in memory, with 7 x 3 none.
#if defined(__AVX512F__)
constexpr int kTileRows = 9;
constexpr int kTileVectors = 3;
#elif defined(__aarch64__)
constexpr int kTileRows = 7;
constexpr int kTileVectors = 3;
#else
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
#endif

template <typename L>
constexpr int64_t kPanelWidth = kTileVectors * L::kWidth;

/// What a tile reads and writes.
template <typename L>
struct Tile {
  const typename L::LeftLane* const* left;  // of each row its lanes, or the panel
  const typename L::Lane* right;
  int64_t lanes;
  const typename L::Sum* from;  // what earlier slices add up to; null: there are none
  int64_t from_stride;
  typename L::Sum* to;
  int64_t to_stride;
};

/// A tile of `rows` x `vectors` sums. Anything more than loops over whole vectors makes the compiler
/// keep some of the sums in memory.
template <typename L, bool left_by_term, int rows, int vectors>
void multiply_tile(const Tile<L>& tile) {
  typename L::Sums sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sums[i][v] = tile.from != nullptr ? load(tile.from + i * tile.from_stride + v * L::kWidth)
                                        : typename L::Sums{};
    }
  }
  const typename L::LeftLane* left[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    left[i] = left_by_term ? tile.left[0] + i : tile.left[i];
  }
  const auto* right = tile.right;
  for (int64_t k = 0; k < tile.lanes; ++k) {
    typename L::Lanes columns[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      columns[v] = load_bits<typename L::Lanes>(right + v * L::kWidth);
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const auto lane = left[i][left_by_term ? k * kTileRows : k];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sums[i][v] = L::multiply_add(sums[i][v], lane, columns[v]);
      }
    }
    right += vectors * L::kWidth;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      store(sums[i][v], tile.to + i * tile.to_stride + v * L::kWidth);
    }
  }
}

template <typename L>
using MultiplyTile = void (*)(const Tile<L>&);

/// The kernels by number of vectors - 1 and number of rows - 1.
template <typename L, bool left_by_term>
struct Kernels {
  MultiplyTile<L> kernels[kTileVectors][kTileRows];

  constexpr Kernels() : kernels{} { set_vectors<kTileVectors>(); }

 private:
  template <int vectors>
  constexpr void set_vectors() {
    if constexpr (vectors > 0) {
      set_rows<vectors, kTileRows>();
      set_vectors<vectors - 1>();
    }
  }

  template <int vectors, int rows>
  constexpr void set_rows() {
    if constexpr (rows > 0) {
      kernels[vectors - 1][rows - 1] = multiply_tile<L, left_by_term, rows, vectors>;
      set_rows<vectors, rows - 1>();
    }
  }
};

template <typename L, bool left_by_term>
constexpr Kernels<L, left_by_term> kKernels;

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
