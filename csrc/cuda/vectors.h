// Rows read and written 16 bytes at a time where their width and addresses allow it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/host_device.h"

namespace torchmoe::cuda {

constexpr int kVectorBytes = 16;

/// `size` neighbours in a row, moved in one access.
template <typename T, int size>
struct alignas(sizeof(T) * size) Vector {
  T values[size];
};

/// Element i of a row's vectors.
template <int size, typename T>
TORCHMOE_HOST_DEVICE const Vector<T, size>& vector_at(const T* row, int64_t i) {
  return reinterpret_cast<const Vector<T, size>*>(row)[i];
}

template <int size, typename T>
TORCHMOE_HOST_DEVICE Vector<T, size>& vector_at(T* row, int64_t i) {
  return reinterpret_cast<Vector<T, size>*>(row)[i];
}

/// Calls body with the number of elements that one access may move, as a constant: 16 bytes' worth
/// where rows of `width` elements start at multiples of 16 bytes in every one of `arrays`, else 1.
template <typename T, typename Body, typename... Arrays>
void with_vector_size(int64_t width, const Body& body, const Arrays*... arrays) {
  constexpr int size = kVectorBytes / sizeof(T);
  const bool aligned = ((reinterpret_cast<std::uintptr_t>(arrays) % kVectorBytes == 0) && ...);
  if (size > 1 && aligned && width % size == 0) {
    body(std::integral_constant<int, size>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

}  // namespace torchmoe::cuda
