// Every expert's matrix as kernels reach it, in either orientation.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace torchmoe {

/// [E, out, in], of which an expert's rows are contiguous or, if transposed, its columns. Null data:
/// none.
template <typename T>
struct Matrices {
  T* data = nullptr;
  int64_t expert_stride = 0;
  int64_t stride = 0;  // between rows, or columns if transposed
  bool transposed = false;

  /// Expert e's, as number 0.
  TORCHMOE_HOST_DEVICE Matrices of(int64_t e) const { return moved(e * expert_stride); }

  /// The rows from row i on, and of each the elements from element j on.
  TORCHMOE_HOST_DEVICE Matrices from(int64_t i, int64_t j) const {
    return moved(transposed ? j * stride + i : i * stride + j);
  }

  /// [E, in, out].
  TORCHMOE_HOST_DEVICE Matrices transpose() const {
    return {data, expert_stride, stride, !transposed};
  }

 private:
  TORCHMOE_HOST_DEVICE Matrices moved(int64_t distance) const {
    return {data == nullptr ? nullptr : data + distance, expert_stride, stride, transposed};
  }
};

}  // namespace torchmoe
