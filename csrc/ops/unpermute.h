#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>

#include "dispatch_plan.h"

namespace torchmoe {

/// The weighted sum of each token's slots, in slot order with wide accumulation, rounded once:
///
///     y[t] = sum over routed slots j of weights[t, j] * rows[slot_to_row[t, j]]
///
/// rows [N, H] floating, weights [T, K] float32, float64 or the dtype of rows -> y [T, H] in the
/// dtype of rows. The weight and the row of an unrouted slot are not read. Differentiable in rows
/// and weights, to any order and in both modes.
at::Tensor unpermute(const at::Tensor& rows, const at::Tensor& weights, const DispatchPlan& plan);

/// Gradients of rows and weights for `grad` [T, H]; 0 for unrouted slots.
std::tuple<at::Tensor, at::Tensor> unpermute_backward(const at::Tensor& grad,
                                                      const at::Tensor& rows,
                                                      const at::Tensor& weights,
                                                      const DispatchPlan& plan);

void check_unpermute(const at::Tensor& rows, const at::Tensor& weights, const DispatchPlan& plan);
void check_unpermute_backward(const at::Tensor& grad,
                              const at::Tensor& rows,
                              const at::Tensor& weights,
                              const DispatchPlan& plan);

/// Checks `weights`, for every op that weights slots; `like` is the tensor that they scale.
void check_weights(std::string_view op,
                   const at::Tensor& weights,
                   const at::Tensor& slots,
                   std::string_view like_name,
                   const at::Tensor& like);

}  // namespace torchmoe
