// The sum is linear in the rows, so that the derivative of its backward is the sum again.
#include "ops/sum_by_expert.h"

#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/tangents.h"

namespace torchmoe {

namespace {

variable_list sum_by_expert_gradient(const Arriving& arriving,
                                     const at::Tensor& expert_offsets,
                                     const c10::SymInt& num_rows) {
  return {sum_by_expert_backward(arriving.grads[0], expert_offsets, num_rows)};
}

at::Tensor sum_by_expert_autograd(const at::Tensor& rows, const at::Tensor& expert_offsets) {
  check_sum_by_expert(rows, expert_offsets);
  const auto sums = below_autograd([&] { return sum_by_expert(rows, expert_offsets); });
  record_node<&sum_by_expert_gradient>(
      "sum_by_expert", {sums}, std::tie(rows), expert_offsets, rows.sym_size(0));
  if (has_tangent(rows)) {
    set_tangent(sums, sum_by_expert(tangent_of(rows), expert_offsets));
  }
  return sums;
}

variable_list sum_by_expert_second_gradient(const Arriving& arriving,
                                            const at::Tensor& expert_offsets) {
  return {sum_by_expert(arriving.grads[0], expert_offsets)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes a SymInt by value.
at::Tensor sum_by_expert_backward_autograd(const at::Tensor& grad,
                                           const at::Tensor& expert_offsets,
                                           c10::SymInt num_rows) {
  // NOLINTEND(performance-unnecessary-value-param)
  check_sum_by_expert_backward(grad, expert_offsets, num_rows);
  const auto rows =
      below_autograd([&] { return sum_by_expert_backward(grad, expert_offsets, num_rows); });
  record_node<&sum_by_expert_second_gradient>(
      "sum_by_expert_backward", {rows}, std::tie(grad), expert_offsets);
  if (has_tangent(grad)) {
    set_tangent(rows, sum_by_expert_backward(tangent_of(grad), expert_offsets, num_rows));
  }
  return rows;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("sum_by_expert", &sum_by_expert_autograd);
  m.impl("_sum_by_expert_backward", &sum_by_expert_backward_autograd);
}

}  // namespace torchmoe
