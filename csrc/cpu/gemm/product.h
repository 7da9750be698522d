// The one place where kernels reach a library's matrix product.
#pragma once

#include <cstdint>

namespace torchmoe::cpu {

/// A matrix in somebody else's memory.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride = 1;

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }

  Matrix row_range(int64_t begin, int64_t end) const {
    return {data + begin * row_stride, end - begin, cols, row_stride, col_stride};
  }

  Matrix col_range(int64_t begin, int64_t end) const {
    return {data + begin * col_stride, rows, end - begin, row_stride, col_stride};
  }
};

/// out = a b, [m, k] times [k, n], for T float or double. Call it inside parallel_tasks only:
/// outside, its rounding depends on the number of threads.
template <typename T>
void product(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<T>& out);

}  // namespace torchmoe::cpu
