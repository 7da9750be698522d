// Reads tensors that may be absent, or whose strides and types vary.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// `tensor` itself where it is contiguous and of that type, else a copy that is.
inline at::Tensor contiguous_as(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.to(dtype).contiguous();
}

inline std::optional<at::Tensor> contiguous_as(const std::optional<at::Tensor>& tensor,
                                               at::ScalarType dtype) {
  return tensor ? std::optional(contiguous_as(*tensor, dtype)) : std::nullopt;
}

inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(tensor->contiguous()) : std::nullopt;
}

/// The form in which modules and Functions keep an optional tensor: undefined if it is absent.
inline std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

/// The data of an optional contiguous tensor, null where there is none.
template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

}  // namespace torchmoe
