// The named checks that every check_X in ops/ is written with. A message reads `op: argument must
// requirement, got actual`. They read metadata only, with symbolic sizes, so that the CPU, CUDA and
// Meta kernels share them.
#pragma once

#include <initializer_list>
#include <string_view>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "dtypes.h"

namespace torchmoe {

/// Every check below makes this one first: an undefined tensor has no shape, dtype or device. None
/// given for a tensor in Python arrives as one.
inline void check_defined(std::string_view op, std::string_view name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), op, ": ", name, " must be a tensor, got None");
}

/// `layout` names the expected dimensions for the message, for example "[num_tokens, hidden_size]".
inline void check_dim(std::string_view op,
                      std::string_view name,
                      const at::Tensor& tensor,
                      int64_t dim,
                      std::string_view layout) {
  check_defined(op, name, tensor);
  TORCH_CHECK(
      tensor.dim() == dim, op, ": ", name, " must be ", layout, ", got shape ", tensor.sym_sizes());
}

inline void check_shape(std::string_view op,
                        std::string_view name,
                        const at::Tensor& tensor,
                        std::initializer_list<c10::SymInt> shape,
                        std::string_view layout) {
  check_defined(op, name, tensor);
  const c10::SymIntArrayRef expected(shape);
  TORCH_CHECK(tensor.sym_sizes() == expected,
              op,
              ": ",
              name,
              " must be ",
              layout,
              " = ",
              expected,
              ", got shape ",
              tensor.sym_sizes());
}

inline void check_dtype(std::string_view op,
                        std::string_view name,
                        const at::Tensor& tensor,
                        at::ScalarType dtype) {
  check_defined(op, name, tensor);
  TORCH_CHECK(tensor.scalar_type() == dtype,
              op,
              ": ",
              name,
              " must be ",
              dtype,
              ", got ",
              tensor.scalar_type());
}

inline void check_floating(std::string_view op, std::string_view name, const at::Tensor& tensor) {
  check_defined(op, name, tensor);
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK(
      is_float_type(dtype), op, ": ", name, " must be ", float_type_names(), ", got ", dtype);
}

/// Both floating and of one dtype: mixed types are a mistake outside autocast, which casts before
/// this check.
inline void check_same_dtype(std::string_view op,
                             std::string_view name,
                             const at::Tensor& tensor,
                             std::string_view other_name,
                             const at::Tensor& other) {
  check_defined(op, name, tensor);
  TORCH_CHECK(tensor.scalar_type() == other.scalar_type(),
              op,
              ": ",
              name,
              " must have the dtype of ",
              other_name,
              " (",
              other.scalar_type(),
              "), got ",
              tensor.scalar_type());
}

inline void check_same_device(std::string_view op,
                              std::string_view name,
                              const at::Tensor& tensor,
                              std::string_view other_name,
                              const at::Tensor& other) {
  check_defined(op, name, tensor);
  TORCH_CHECK(tensor.device() == other.device(),
              op,
              ": ",
              name,
              " must be on the device of ",
              other_name,
              " (",
              other.device(),
              "), got ",
              tensor.device());
}

/// For an op that has a kernel for the CPU alone; Meta tensors stand for those of any device.
inline void check_cpu(std::string_view op, std::string_view name, const at::Tensor& tensor) {
  check_defined(op, name, tensor);
  TORCH_CHECK(tensor.is_cpu() || tensor.is_meta(),
              op,
              ": ",
              name,
              " must be on the CPU, got ",
              tensor.device());
}

/// Checks the number of experts per token against the number of experts.
inline void check_top_k(std::string_view op, int64_t top_k, const c10::SymInt& num_experts) {
  TORCH_CHECK_VALUE(top_k >= 1 && num_experts >= top_k,
                    op,
                    ": top_k must be in [1, ",
                    num_experts,
                    "], got ",
                    top_k);
}

/// What a backward op requires of the incoming gradient, besides its shape: kernels read it in
/// whatever floating type it has, where the op's own tensors are.
inline void check_gradient(std::string_view op,
                           const at::Tensor& grad,
                           std::string_view like_name,
                           const at::Tensor& like) {
  check_floating(op, "grad", grad);
  check_same_device(op, "grad", grad, like_name, like);
}

}  // namespace torchmoe
