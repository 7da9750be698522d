// Matrices [E, out, in] whose rows are contiguous, or whose columns are: a view of [E, in, out].
#pragma once

#include <type_traits>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "matrices.h"

namespace torchmoe {

/// Whether an expert's columns are contiguous and its rows are not.
inline bool is_transposed(const at::Tensor& matrices) {
  return matrices.sym_stride(2) != 1 && matrices.sym_stride(1) == 1;
}

/// `matrices` itself where its rows or its columns are contiguous, else a copy whose rows are.
inline at::Tensor oriented(const at::Tensor& matrices) {
  const bool in_place = matrices.stride(2) == 1 || is_transposed(matrices);
  return in_place ? matrices : matrices.contiguous();
}

/// Uninitialised, dense, of the shape and orientation of `matrices`: a gradient that torch can keep
/// as a parameter's without copying it.
inline at::Tensor empty_oriented_like(const at::Tensor& matrices) {
  const auto num_experts = matrices.sym_size(0);
  const auto rows = matrices.sym_size(1);
  const auto columns = matrices.sym_size(2);
  return is_transposed(matrices)
             ? at::empty_symint({num_experts, columns, rows}, matrices.options()).transpose(1, 2)
             : at::empty_symint({num_experts, rows, columns}, matrices.options());
}

/// The same if a gradient is required, else a tensor of shape [0].
inline at::Tensor empty_oriented_if(bool wanted, const at::Tensor& matrices) {
  return wanted ? empty_oriented_like(matrices) : at::empty({0}, matrices.options());
}

/// The numbers of a tensor that one of these functions has given.
template <typename T>
Matrices<T> matrices_of(const at::Tensor& tensor) {
  T* data = nullptr;
  if constexpr (std::is_const_v<T>) {
    data = tensor.const_data_ptr<std::remove_const_t<T>>();
  } else {
    data = tensor.mutable_data_ptr<T>();
  }
  const bool transposed = is_transposed(tensor);
  return {data, tensor.stride(0), tensor.stride(transposed ? 2 : 1), transposed};
}

}  // namespace torchmoe
