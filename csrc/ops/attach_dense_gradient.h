#pragma once

#include <string_view>

#include <ATen/core/Tensor.h>

#include "expert_parameters.h"

namespace torchmoe {

/// A copy of y whose backward pass gives probs the gradient of the dense mixture: with E_i(x) the
/// experts of expert_mlp,
///
///     dL/dprobs[t, i] = <dL/dy[t], E_i(x[t])>    for every expert i, chosen or not
///
/// and y's own gradient unchanged. The effect is that of adding sum_i (probs[t, i] - constant)
/// E_i(x[t]), whose value is 0, to y, but no expert is computed in the forward pass. The backward
/// pass is DenseMixer's (https://openreview.net/forum?id=4HGIIekCx3). x and the experts' weights
/// get no gradient here.
///
/// y [T, H], probs [T, E] and x [T, H] floating -> [T, H] in y's dtype. x is converted to the experts'.
/// Differentiable in y and probs; the gradient of probs is differentiable in everything that it is
/// computed from, to any order. Saves its inputs. Backward takes 2 T E H (P + I) FLOPs and, with A
/// = activation(w_in x + b_in), forms <dL/dy w_out, A> + <dL/dy, b_out> in blocks of tokens, never
/// an array of size [T, E, H].
at::Tensor attach_dense_gradient(const at::Tensor& y,
                                 const at::Tensor& probs,
                                 const at::Tensor& x,
                                 const ExpertParameters& experts,
                                 const ExpertActivation& activation);

/// The gradient of probs for `grad` [T, H]: [T, E], float32 (float64 for experts of float64).
at::Tensor attach_dense_gradient_backward(const at::Tensor& grad,
                                          const at::Tensor& x,
                                          const ExpertParameters& experts,
                                          const ExpertActivation& activation);

void check_attach_dense_gradient(const at::Tensor& y,
                                 const at::Tensor& probs,
                                 const at::Tensor& x,
                                 const ExpertParameters& experts,
                                 const ExpertActivation& activation);
void check_attach_dense_gradient_backward(const at::Tensor& grad,
                                          const at::Tensor& x,
                                          const ExpertParameters& experts,
                                          const ExpertActivation& activation);

}  // namespace torchmoe
