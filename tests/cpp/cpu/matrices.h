// Tensors as the matrices of tests/cpp/simd, and back.
#pragma once

#include <algorithm>

#include "simd/matrix.h"
#include "support.h"

namespace torchmoe::test {

inline Matrix matrix_of(const Tensor& tensor) {
  const Tensor numbers = tensor.to(torch::kDouble).contiguous();
  Matrix result(numbers.size(0), numbers.size(1));
  std::copy_n(numbers.const_data_ptr<double>(), result.size(), result.numbers().begin());
  return result;
}

inline Tensor tensor_of(const Matrix& matrix) {
  return torch::tensor(matrix.numbers(), torch::kDouble).view({matrix.rows(), matrix.columns()});
}

}  // namespace torchmoe::test
