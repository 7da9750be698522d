// The convention of every backward op with an output_mask.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace torchmoe {

/// An uninitialised tensor of `sizes` if a gradient is required, else one of shape [0]: an
/// undefined tensor cannot pass through an autograd Function, and a gradient that is not required
/// must cost nothing.
inline at::Tensor empty_if(bool wanted,
                           c10::SymIntArrayRef sizes,
                           const at::TensorOptions& options) {
  return wanted ? at::empty_symint(sizes, options) : at::empty({0}, options);
}

}  // namespace torchmoe
