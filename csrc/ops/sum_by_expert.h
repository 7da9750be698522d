#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

namespace torchmoe {

/// The sum of each expert's rows:
///
///     sums[e] = sum of rows[r] for expert_offsets[e] <= r < expert_offsets[e + 1], in row order
///
/// and 0 for an expert without rows; the rows from expert_offsets[E] on are not read.
///
/// rows [N, H] floating, expert_offsets [E + 1] int64, as in dispatch_plan -> [E, H] in the dtype of
/// rows. Sums are formed wide and rounded once. Differentiable in rows, to any order and in both
/// modes.
at::Tensor sum_by_expert(const at::Tensor& rows, const at::Tensor& expert_offsets);

/// Gradient of rows [N, H] for `grad` [E, H], num_rows = N: every row has its expert's gradient, 0
/// for rows that belong to no expert.
at::Tensor sum_by_expert_backward(const at::Tensor& grad,
                                  const at::Tensor& expert_offsets,
                                  c10::SymInt num_rows);

void check_sum_by_expert(const at::Tensor& rows, const at::Tensor& expert_offsets);
void check_sum_by_expert_backward(const at::Tensor& grad,
                                  const at::Tensor& expert_offsets,
                                  const c10::SymInt& num_rows);

}  // namespace torchmoe
