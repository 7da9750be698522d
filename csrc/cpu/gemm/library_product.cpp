#include "cpu/gemm/library_product.h"

#include <algorithm>

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

// MKL's own name; a build of torch without MKL leaves it null.
// NOLINTNEXTLINE(readability-identifier-naming)
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int num_threads);

namespace torchmoe::cpu {

namespace {

/// Lets MKL split a product for one thread. Inside a parallel region it computes on one anyway, but
/// on the thread that opened the region it still splits, and with that rounds, for as many as torch
/// set there.
class OneThread {
 public:
  OneThread() : before_(set(1)) {}
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;
  ~OneThread() { set(before_); }

 private:
  static int set(int num_threads) {
    return MKL_Set_Num_Threads_Local == nullptr ? 0 : MKL_Set_Num_Threads_Local(num_threads);
  }

  int before_;
};

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
void library_product(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<T>& out) {
  if (out.rows == 0 || out.cols == 0) {
    return;
  }
  const OneThread one_thread;
  auto out_tensor = as_tensor(out);
  // at::cpu::mm_out is the kernel below the dispatcher: worker threads have neither the caller's
  // autograd nor its autocast state, so nothing above the kernel may be asked here. With no columns
  // to sum over it writes zeros.
  at::cpu::mm_out(out_tensor, as_tensor(a), as_tensor(b));
}

template void library_product(const Matrix<const float>&,
                              const Matrix<const float>&,
                              const Matrix<float>&);
template void library_product(const Matrix<const double>&,
                              const Matrix<const double>&,
                              const Matrix<double>&);

}  // namespace torchmoe::cpu
