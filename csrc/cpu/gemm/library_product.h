// The one place where kernels reach a library's matrix product.
#pragma once

#include <cstdint>

namespace torchmoe::cpu {

/// A matrix in memory that it does not own.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride = 1;

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

/// out = a b, [m, k] times [k, n], for T float or double. Call it inside parallel_workers only:
/// outside, its rounding depends on the number of threads.
template <typename T>
void library_product(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<T>& out);

}  // namespace torchmoe::cpu
