#pragma once

#include <array>
#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// Each expert's linear layer on its own rows: for expert_offsets[e] <= r < expert_offsets[e + 1]
///
///     out[r] = rows[r] weight[e]^T + bias[e]
///
/// and 0 for the rows from expert_offsets[E] on, which are not read.
///
/// rows [N, I], weight [E, O, I], bias [E, O], of one floating dtype; expert_offsets [E + 1] int64,
/// ascending within [0, N]
/// -> [N, O] in that dtype. Differentiable in rows, weight and bias, to any order; the weight's
/// gradient is dense, 0 for an idle expert. The weight is read in place where its rows or
/// its columns are contiguous, and its gradient lies in memory as it does.
at::Tensor grouped_linear(const at::Tensor& rows,
                          const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias,
                          const at::Tensor& expert_offsets);

/// Gradients of rows, weight and bias for `grad` [N, O]; one that output_mask leaves out is an
/// empty tensor of shape [0].
std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(
    const at::Tensor& grad,
    const at::Tensor& rows,
    const at::Tensor& weight,
    const at::Tensor& expert_offsets,
    std::array<bool, 3> output_mask);

void check_grouped_linear(const at::Tensor& rows,
                          const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias,
                          const at::Tensor& expert_offsets);
void check_grouped_linear_backward(const at::Tensor& grad,
                                   const at::Tensor& rows,
                                   const at::Tensor& weight,
                                   const at::Tensor& expert_offsets);

}  // namespace torchmoe
