#include "ops/sum_by_expert.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cummax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/searchsorted.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"
#include "ops/dispatch_plan.h"

namespace torchmoe {

at::Tensor sum_by_expert(const at::Tensor& rows, const at::Tensor& expert_offsets) {
  static const auto op = find_op<decltype(sum_by_expert)>("torchmoe::sum_by_expert");
  return op.call(rows, expert_offsets);
}

at::Tensor sum_by_expert_backward(const at::Tensor& grad,
                                  const at::Tensor& expert_offsets,
                                  c10::SymInt num_rows) {
  static const auto op =
      find_op<decltype(sum_by_expert_backward)>("torchmoe::_sum_by_expert_backward");
  return op.call(grad, expert_offsets, std::move(num_rows));
}

void check_sum_by_expert(const at::Tensor& rows, const at::Tensor& expert_offsets) {
  constexpr auto op = "sum_by_expert";
  check_dim(op, "rows", rows, 2, "[num_rows, hidden_size]");
  check_floating(op, "rows", rows);
  check_expert_offsets(op, expert_offsets, "rows", rows);
}

void check_sum_by_expert_backward(const at::Tensor& grad,
                                  const at::Tensor& expert_offsets,
                                  const c10::SymInt& num_rows) {
  constexpr auto op = "_sum_by_expert_backward";
  check_dim(op, "grad", grad, 2, "[num_experts, hidden_size]");
  check_floating(op, "grad", grad);
  check_expert_offsets(op, expert_offsets, "grad", grad);
  check_shape(op,
              "grad",
              grad,
              {expert_offsets.sym_size(0) - 1, grad.sym_size(1)},
              "[num_experts, hidden_size]");
  TORCH_CHECK_VALUE(num_rows >= 0, op, ": num_rows must be >= 0, got ", num_rows);
}

namespace {

at::Tensor sum_by_expert_meta(const at::Tensor& rows, const at::Tensor& expert_offsets) {
  check_sum_by_expert(rows, expert_offsets);
  return at::empty_symint({expert_offsets.sym_size(0) - 1, rows.sym_size(1)}, rows.options());
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes a SymInt by value.
at::Tensor sum_by_expert_backward_composite(const at::Tensor& grad,
                                            const at::Tensor& expert_offsets,
                                            c10::SymInt num_rows) {
  // NOLINTEND(performance-unnecessary-value-param)
  check_sum_by_expert_backward(grad, expert_offsets, num_rows);
  // The kernels read offsets that decrease, or lie outside the rows, as the largest so far.
  const auto starts = std::get<0>(at::cummax(expert_offsets.clamp_min(0), 0));
  const auto row = at::arange(num_rows, expert_offsets.options());
  // How many starts a row lies behind: of no expert, of the row's own and those before it, of all.
  const auto passed = at::searchsorted(starts, row, /*out_int32=*/false, /*right=*/true);
  const auto nobodys = grad.new_zeros_symint({1, grad.sym_size(1)});
  return at::index_select(at::cat({nobodys, grad, nobodys}), 0, passed);
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("_sum_by_expert_backward", &sum_by_expert_backward_composite);
}

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("sum_by_expert", &sum_by_expert_meta);
}

}  // namespace torchmoe
