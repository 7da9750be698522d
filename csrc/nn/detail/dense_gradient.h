// The gradient of the dense mixture, for experts of any kind.
#pragma once

#include <ATen/core/Tensor.h>

#include "nn/replaceable.h"

namespace torchmoe::nn {

/// A copy of y [T, H] whose backward pass gives probs [T, E] the gradient <dL/dy[t], E_i(x[t])> for
/// every expert i: `attach_dense_gradient` where the experts are `Experts`; others are called in
/// the backward pass, once each on all tokens. x [T, H] and the experts' parameters get no gradient
/// here.
at::Tensor attach_dense_gradient_of(const ExpertFunction& experts,
                                    const at::Tensor& y,
                                    const at::Tensor& probs,
                                    const at::Tensor& x);

}  // namespace torchmoe::nn
