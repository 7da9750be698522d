// The named checks that every check_X in ops/ is written with. A message reads `op: argument must
// requirement, got actual`. They read metadata only, with symbolic sizes, so that the CPU, CUDA and
// Meta kernels share them.
#pragma once

#include <initializer_list>
#include <string_view>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace torchmoe {

/// `layout` names the expected dimensions for the message, for example "[num_tokens, hidden_size]".
inline void check_dim(std::string_view op,
                      std::string_view name,
                      const at::Tensor& tensor,
                      int64_t dim,
                      std::string_view layout) {
  TORCH_CHECK(
      tensor.dim() == dim, op, ": ", name, " must be ", layout, ", got shape ", tensor.sym_sizes());
}

inline void check_shape(std::string_view op,
                        std::string_view name,
                        const at::Tensor& tensor,
                        std::initializer_list<c10::SymInt> shape,
                        std::string_view layout) {
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
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      op,
      ": ",
      name,
      " must be float32, float64, bfloat16 or float16, got ",
      dtype);
}

/// Both floating and of one dtype: mixed types are a mistake outside autocast, which casts before
/// this check.
inline void check_same_dtype(std::string_view op,
                             std::string_view name,
                             const at::Tensor& tensor,
                             std::string_view other_name,
                             const at::Tensor& other) {
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

}  // namespace torchmoe
