#include "cpu/gemm/product.h"

#include <algorithm>

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

namespace torchmoe::cpu {

namespace {

template <typename T>
at::Tensor as_tensor(const Matrix<T>& matrix) {
  using Value = std::remove_const_t<T>;
  return at::from_blob(const_cast<Value*>(matrix.data),
                       {matrix.rows, matrix.cols},
                       {matrix.row_stride, matrix.col_stride},
                       at::TensorOptions(c10::CppTypeToScalarType<Value>::value));
}

}  // namespace

template <typename T>
void product(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<T>& out) {
  if (out.rows == 0 || out.cols == 0) {
    return;
  }
  auto out_tensor = as_tensor(out);
  // at::cpu::mm_out is the kernel below the dispatcher: worker threads have neither the caller's
  // autograd nor its autocast state, so nothing above the kernel may be asked here. With no columns
  // to sum over it writes zeros.
  at::cpu::mm_out(out_tensor, as_tensor(a), as_tensor(b));
}

template void product(const Matrix<const float>&, const Matrix<const float>&, const Matrix<float>&);
template void product(const Matrix<const double>&,
                      const Matrix<const double>&,
                      const Matrix<double>&);

}  // namespace torchmoe::cpu
