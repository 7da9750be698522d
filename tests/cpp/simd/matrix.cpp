#include "simd/matrix.h"

#include <algorithm>
#include <cmath>

namespace torchmoe::test {

Matrix Matrix::transposed() const {
  Matrix result(columns_, rows_);
  for (int64_t i = 0; i < rows_; ++i) {
    for (int64_t j = 0; j < columns_; ++j) {
      result(j, i) = (*this)(i, j);
    }
  }
  return result;
}

Matrix Matrix::last(int64_t rows, int64_t columns) const {
  Matrix result(rows, columns);
  for (int64_t i = 0; i < rows; ++i) {
    const double* from = row(rows_ - rows + i) + columns_ - columns;
    std::copy_n(from, columns, result.row(i));
  }
  return result;
}

bool Matrix::equals(const Matrix& other) const {
  const auto is_same = [](double a, double b) {
    return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
  };
  return rows_ == other.rows_ && columns_ == other.columns_ &&
         std::equal(numbers_.begin(), numbers_.end(), other.numbers_.begin(), is_same);
}

std::pair<Matrix, Matrix> product(const Matrix& left, const Matrix& right) {
  Matrix sums(left.rows(), right.columns()), sizes = sums;
  for (int64_t i = 0; i < left.rows(); ++i) {
    for (int64_t k = 0; k < left.columns(); ++k) {
      const double a = left(i, k);
      for (int64_t j = 0; j < right.columns(); ++j) {
        const double term = a * right(k, j);
        sums(i, j) += term;
        sizes(i, j) += std::fabs(term);
      }
    }
  }
  return {sums, sizes};
}

Matrix wave_matrix(int64_t rows, int64_t columns, double phase, double scale) {
  Matrix result(rows, columns);
  for (int64_t i = 0; i < result.size(); ++i) {
    result.numbers()[i] = scale * std::sin(1.3 * static_cast<double>(i) + 0.4 + phase);
  }
  return result;
}

}  // namespace torchmoe::test
