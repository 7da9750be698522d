// Memory for results and for what lies between products.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace torchmoe::cpu {

/// An uninitialised tensor, whose memory Linux may give in pages of 2 MB. The first touch of a page
/// costs the kernel about a microsecond, whatever its size, and a step's gradients are memory that
/// has not been touched yet.
inline at::Tensor in_large_pages(at::Tensor tensor) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  auto* data = static_cast<char*>(tensor.mutable_data_ptr());
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + tensor.nbytes()) / kPage * kPage;
  if (first < last) {
    // Advice: where it is refused, nothing is lost.
    static_cast<void>(madvise(data + (first - begin), last - first, MADV_HUGEPAGE));
  }
#endif
  return tensor;
}

inline at::Tensor empty_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return in_large_pages(at::empty(sizes, options));
}

}  // namespace torchmoe::cpu
