#pragma once

#include <string_view>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// The combine weight of each slot, given the choice of experts. With p = score_function(logits)
/// ("softmax" over all experts, or "sigmoid") and i_j the expert of slot j:
///
///     normalize "none"      w_j = p[t, i_j]
///     normalize "topk"      w_j = p[t, i_j] / sum over the token's routed slots of p; computed
///                           from those slots' logits relative to their own maximum where p itself
///                           underflows; if the sum is 0 (all logits -inf) the weights are 0
///     normalize "uniform"   w_j = 1 / number of the token's routed slots
///
/// A slot whose id is outside [0, E) is not routed: weight 0. A softmax over logits that are all
/// -inf is 0. logits [T, E] floating, indices [T, K] int64 -> weights [T, K], float32 (float64 for
/// float64). Computed in that type.
///
/// Differentiable in logits, to any order and in both modes. `estimator` chooses the gradient; g_j
/// is the gradient arriving at slot j:
///
///     "exact"               the derivative of the forward formula
///     "straight_through"    selection and normalisation count as the identity: dL/dp_i = sum of
///                           g_j over routed slots with i_j = i, 0 for experts the token did not
///                           choose; dL/dlogits = J_score^T dL/dp
///
/// If logits require a gradient or carry a tangent, a derivative that is zero everywhere is
/// refused: "exact" with "uniform", or with "topk" and K = 1.
at::Tensor gate_weights(const at::Tensor& logits,
                        const at::Tensor& indices,
                        std::string_view score_function,
                        std::string_view normalize,
                        std::string_view estimator);

/// Gradient of logits [T, E] for `grad` [T, K].
at::Tensor gate_weights_backward(const at::Tensor& grad,
                                 const at::Tensor& logits,
                                 const at::Tensor& indices,
                                 std::string_view score_function,
                                 std::string_view normalize,
                                 std::string_view estimator);

void check_gate_weights(const at::Tensor& logits,
                        const at::Tensor& indices,
                        std::string_view score_function,
                        std::string_view normalize,
                        std::string_view estimator);
void check_gate_weights_backward(const at::Tensor& grad,
                                 const at::Tensor& logits,
                                 const at::Tensor& indices,
                                 std::string_view score_function,
                                 std::string_view normalize,
                                 std::string_view estimator);

}  // namespace torchmoe
