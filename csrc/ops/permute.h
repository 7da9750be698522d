#pragma once

#include <ATen/core/Tensor.h>

#include "dispatch_plan.h"

namespace torchmoe {

/// Tokens copied into expert order: rows[r] = x[row_to_slot[r] / K] for r < expert_offsets[E], 0
/// for the rows after.
///
/// x [T, H] floating, a plan over [T, K] slots -> rows [N, H] in x's dtype. Differentiable in x, to
/// any order and in both modes.
at::Tensor permute(const at::Tensor& x, const DispatchPlan& plan);

/// Gradient of x [T, H] for `grad` [N, H]: the sum of a token's routed rows, in slot order.
at::Tensor permute_backward(const at::Tensor& grad, const DispatchPlan& plan);

void check_permute(const at::Tensor& x, const DispatchPlan& plan);
void check_permute_backward(const at::Tensor& grad, const DispatchPlan& plan);

}  // namespace torchmoe
