#pragma once

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// A copy of x whose gradient arrives multiplied by `scale`: dL/dx = dL/dy * scale.
///
/// x floating, scale floating and broadcastable to x's shape (it may not enlarge it) -> a tensor
/// like x. Differentiable in x, to any order; a tangent is multiplied like a gradient. scale has
/// neither. Usage-scaled routers pass 1 - usage[:, None].
at::Tensor scale_gradient(const at::Tensor& x, const at::Tensor& scale);

void check_scale_gradient(const at::Tensor& x, const at::Tensor& scale);

}  // namespace torchmoe
