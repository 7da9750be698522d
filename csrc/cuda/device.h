// Where an op runs: on its tensors' device, on the stream that is current there.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/stream.h"

namespace torchmoe::cuda {

/// Makes the device of `tensor` the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& tensor) : guard_(tensor.device()) {}

  Stream stream() const { return c10::cuda::getCurrentCUDAStream(); }

 private:
  c10::cuda::CUDAGuard guard_;
};

}  // namespace torchmoe::cuda
