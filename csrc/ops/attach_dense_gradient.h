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
/// and y's own gradient unchanged. It stands for adding sum_i (probs[t, i] - constant) E_i(x[t]),
/// with a value of 0, to y, without computing an expert in the forward pass (the backward pass of
/// DenseMixer, https://openreview.net/forum?id=4HGIIekCx3). x and the experts' weights get no
/// gradient here.
///
/// y [T, H] and probs [T, E] floating; x [T, H] of the experts' dtype -> [T, H] in y's dtype.
/// Differentiable in y and probs; the gradient of probs is differentiable by all that it is made
/// of, any number of times. Saves its inputs;
/// backward takes 2 T E H (P + I) FLOPs and, with A = activation(w_in x + b_in), forms <dL/dy w_out,
/// A> + <dL/dy, b_out> in blocks of tokens, never an array of size [T, E, H].
at::Tensor attach_dense_gradient(const at::Tensor& y,
                                 const at::Tensor& probs,
                                 const at::Tensor& x,
                                 const ExpertParameters& experts,
                                 std::string_view activation);

/// The gradient of probs for `grad` [T, H]: [T, E], float32 (float64 for float64 x).
at::Tensor attach_dense_gradient_backward(const at::Tensor& grad,
                                          const at::Tensor& x,
                                          const ExpertParameters& experts,
                                          std::string_view activation);

void check_attach_dense_gradient(const at::Tensor& y,
                                 const at::Tensor& probs,
                                 const at::Tensor& x,
                                 const ExpertParameters& experts,
                                 std::string_view activation);
void check_attach_dense_gradient_backward(const at::Tensor& grad,
                                          const at::Tensor& x,
                                          const ExpertParameters& experts,
                                          std::string_view activation);

}  // namespace torchmoe
