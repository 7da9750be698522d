// The types of tensors, as c10's enumerators and as C++ types.
#pragma once

#include <array>
#include <string>

#include <ATen/OpMathType.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "float_types.h"

namespace torchmoe {

/// float64 for float64, else float32: the dtype of logits, gate weights and losses, and of every
/// accumulation.
inline at::ScalarType accumulate_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

constexpr bool is_float_type(at::ScalarType dtype) {
#define TORCHMOE_IS_TYPE(type, scalar_type, name) || dtype == at::ScalarType::scalar_type
  return false TORCHMOE_FLOAT_TYPES(TORCHMOE_IS_TYPE);
#undef TORCHMOE_IS_TYPE
}

/// "float32, float64, bfloat16 or float16".
inline std::string float_type_names() {
#define TORCHMOE_TYPE_NAME(type, scalar_type, name) name,
  constexpr std::array kNames{TORCHMOE_FLOAT_TYPES(TORCHMOE_TYPE_NAME)};
#undef TORCHMOE_TYPE_NAME
  std::string names;
  for (size_t i = 0; i < kNames.size(); ++i) {
    names += i == 0 ? "" : i + 1 == kNames.size() ? " or " : ", ";
    names += kNames[i];
  }
  return names;
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_CALL_WITH(type, scalar_type, name) \
  case at::ScalarType::scalar_type:                 \
    return body.template operator()<type>();
// NOLINTEND(bugprone-macro-parentheses)

/// Calls `body`, a lambda with one type parameter, with the type of a tensor of `dtype`, which a
/// check has found to be one of the table's.
template <typename Body>
decltype(auto) with_float_type(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    TORCHMOE_FLOAT_TYPES(TORCHMOE_CALL_WITH)
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for ", dtype);
  }
}

/// The same for a dtype of accumulate_dtype.
template <typename Body>
decltype(auto) with_accumulate_type(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    TORCHMOE_ACCUMULATE_TYPES(TORCHMOE_CALL_WITH)
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for ", dtype);
  }
}
#undef TORCHMOE_CALL_WITH

}  // namespace torchmoe
