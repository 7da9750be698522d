// Elements of the library's types as cpu/simd takes them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/float_types.h"
#include "cpu/simd/simd.h"

namespace torchmoe::cpu {

/// T as cpu/simd names it.
template <typename T>
constexpr Element element_of() {
#define TORCHMOE_ELEMENT(name, stored, type) \
  if constexpr (std::is_same_v<T, type>) {   \
    return Element::name;                    \
  } else
  TORCHMOE_ELEMENTS(TORCHMOE_ELEMENT) {
    static_assert(sizeof(T) == 0, "cpu/simd has no such numbers");
  }
#undef TORCHMOE_ELEMENT
}

template <typename T>
Numbers numbers(const T* data) {
  return {data, element_of<T>()};
}

template <typename T>
MutableNumbers numbers(T* data) {
  return {data, element_of<T>()};
}

}  // namespace torchmoe::cpu
