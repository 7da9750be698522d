// In place of csrc/cuda/device.h: tensors are on the CPU, and kernels for CUDA take the CPU's place.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "cuda/stream.h"

// Adapters register for CUDA; here their tensors are the CPU's.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) TORCHMOE_EMULATED_IMPL_##key(ns, m)
#define TORCHMOE_EMULATED_IMPL_CUDA(ns, m) _TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)

namespace torchmoe::cuda {

class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.is_cpu(), "emulation: tensors must be on the CPU");
  }

  static Stream stream() { return {}; }
};

}  // namespace torchmoe::cuda
