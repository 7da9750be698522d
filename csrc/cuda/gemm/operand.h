// The operands of a product over tiles: sums[m, n] = sum over depth of a[m, depth] b[n, depth].
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/matrices.h"
#include "cuda/vectors.h"

namespace torchmoe::cuda {

/// Which of an operand's two dimensions lies contiguous in memory. The other one is its lines: a
/// line is a row of the tensor.
enum class Contiguous { depth, side };

/// Which rows of a tensor the lines of a tile are.
struct Lines {
  int64_t begin = 0;
  int64_t end = 0;
  /// Where rows are gathered: the source of each, negative for none; null: they are in place.
  const int64_t* sources = nullptr;
  /// Lines from `half` on are rows `second` further down: the two halves of a gated expert's w_in,
  /// side by side in one tile.
  int64_t half = INT64_MAX;
  int64_t second = 0;

  /// The row of line i, or a negative number where there is none and 0 stands for its entries.
  TORCHMOE_HOST_DEVICE int64_t row(int64_t i) const {
    const bool further = i >= half;
    const int64_t r = begin + (further ? i - half : i);
    if (r >= end) {
      return -1;
    }
    return (sources == nullptr ? r : sources[r]) + (further ? second : 0);
  }
};

/// A tensor of rows as one operand of one tile.
template <typename T>
struct Operand {
  const T* data = nullptr;
  int64_t row_stride = 0;
  Lines lines;
  int64_t first_column = 0;
  int64_t num_columns = 0;
  /// Columns of the tile from `half` on are those `second` further on: the same where the halves of
  /// w_in lie along the lines.
  int64_t half = INT64_MAX;
  int64_t second = 0;
  /// Whether 16 bytes from every eighth (for 16-bit types) column on may be read at once.
  bool aligned = false;

  /// The column of the tile's column i.
  TORCHMOE_HOST_DEVICE int64_t column(int64_t i) const {
    return first_column + (i >= half ? i - half + second : i);
  }
};

/// Whether an operand of these rows may be `aligned`.
template <typename T>
bool allows_vectors(const T* data, int64_t width) {
  return reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0 &&
         width * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
}

/// The same of every expert's matrix.
template <typename T>
bool allows_vectors(const Matrices<T>& matrices) {
  return allows_vectors(matrices.data, matrices.stride) &&
         allows_vectors(matrices.data, matrices.expert_stride);
}

}  // namespace torchmoe::cuda
