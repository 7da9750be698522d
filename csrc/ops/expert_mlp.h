#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>

#include "dispatch_plan.h"
#include "expert_activation.h"
#include "expert_parameters.h"

namespace torchmoe {

/// The chosen experts' feed-forward networks and their weighted sum, in one op per direction:
///
///     y[t] = sum over routed slots j of weights[t, j] * (w_out[i] a + b_out[i]),  i = indices[t, j]
///     a    = activation(w_in[i] x[t] + b_in[i])
///
/// and a = f(gate) * up for the gated activations, or what ExpertActivation makes of that.
///
/// x [T, H]; indices [T, K] int64, an id outside [0, E) is not routed; weights [T, K] float32,
/// float64 or x's dtype -> y [T, H] in x's dtype. A token that names an expert twice gets both
/// slots. The experts compute in their own dtype: x of another one is converted to it, and y and
/// x's gradient are rounded once, from their sums to x's.
///
/// w_in and w_out are read in place where their rows or their columns are contiguous, as those of a
/// transposed [E, in, out] are, and their gradients lie in memory as they do.
///
/// Differentiable to any order, in reverse and in forward mode, in x, weights, w_in, b_in, w_out
/// and b_out. Saves x, the pre-activation [N, P], weights and integers, and nothing of size [N, H]:
/// with dA' = dL/dy w_out the gradient of a weight is <dA', a> + <dL/dy, b_out>, which needs no
/// expert's output. Tangents and higher derivatives are formed by permute, grouped_linear and
/// unpermute, which keep arrays of N rows.
at::Tensor expert_mlp(const at::Tensor& x,
                      const at::Tensor& indices,
                      const at::Tensor& weights,
                      const ExpertParameters& experts,
                      const ExpertActivation& activation);

/// y and, with save_pre, the pre-activation [N, P] in row order (rows past expert_offsets[E] are
/// 0), else [0, P].
///
/// With `wide` y is what would be rounded to x's dtype, in the dtype of sums: float32, or float64
/// for experts of float64. A token whose slots are computed in several calls is then added up and rounded as
/// in one call. It has no derivative, so that inputs that require a gradient are refused.
std::tuple<at::Tensor, at::Tensor> expert_mlp_forward(const at::Tensor& x,
                                                      const at::Tensor& weights,
                                                      const ExpertParameters& experts,
                                                      const DispatchPlan& plan,
                                                      bool save_pre,
                                                      const ExpertActivation& activation,
                                                      bool wide = false);

using ExpertMlpGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// An output_mask by name. Lambdas in parallel regions capture it, as not every compiler lets them
/// capture structured bindings.
struct ExpertMlpWanted {
  explicit ExpertMlpWanted(const std::array<bool, 6>& output_mask)
      : x(output_mask[0]),
        weights(output_mask[1]),
        w_in(output_mask[2]),
        b_in(output_mask[3]),
        w_out(output_mask[4]),
        b_out(output_mask[5]) {}

  bool x, weights, w_in, b_in, w_out, b_out;
};

/// Gradients of x, weights, w_in, b_in, w_out and b_out for `grad` [T, H]; one that output_mask
/// leaves out is an empty tensor of shape [0]. b_in is in `pre` already, which is a constant here:
/// its own derivatives by x, w_in and b_in belong to the op that made it. With `wide` x's gradient
/// is in the dtype of sums, as y is above.
ExpertMlpGradients expert_mlp_backward(const at::Tensor& grad,
                                       const at::Tensor& x,
                                       const at::Tensor& weights,
                                       const ExpertParameters& experts,
                                       const DispatchPlan& plan,
                                       const at::Tensor& pre,
                                       std::array<bool, 6> output_mask,
                                       const ExpertActivation& activation,
                                       bool wide = false);

/// The dtype of y and of x's gradient.
at::ScalarType expert_mlp_result_dtype(const at::Tensor& x,
                                       const ExpertParameters& experts,
                                       bool wide);

void check_expert_mlp(const at::Tensor& x,
                      const at::Tensor& indices,
                      const at::Tensor& weights,
                      const ExpertParameters& experts,
                      const ExpertActivation& activation);
/// The private parts: with a plan over as many experts as there are parameters.
void check_expert_mlp_forward(const at::Tensor& x,
                              const at::Tensor& weights,
                              const ExpertParameters& experts,
                              const DispatchPlan& plan,
                              const ExpertActivation& activation);
void check_expert_mlp_backward(const at::Tensor& grad,
                               const at::Tensor& x,
                               const at::Tensor& weights,
                               const ExpertParameters& experts,
                               const DispatchPlan& plan,
                               const at::Tensor& pre,
                               const ExpertActivation& activation);

}  // namespace torchmoe
