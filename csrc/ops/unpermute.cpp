#include "ops/unpermute.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"

namespace torchmoe {

at::Tensor unpermute(const at::Tensor& rows, const at::Tensor& weights, const DispatchPlan& plan) {
  static const auto op = find_op<decltype(unpermute)>("torchmoe::unpermute");
  return call(op, rows, weights, plan);
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward(const at::Tensor& grad,
                                                      const at::Tensor& rows,
                                                      const at::Tensor& weights,
                                                      const DispatchPlan& plan) {
  static const auto op = find_op<decltype(unpermute_backward)>("torchmoe::_unpermute_backward");
  return call(op, grad, rows, weights, plan);
}

void check_weights(std::string_view op,
                   const at::Tensor& weights,
                   const at::Tensor& slots,
                   std::string_view like_name,
                   const at::Tensor& like) {
  check_shape(
      op, "weights", weights, {slots.sym_size(0), slots.sym_size(1)}, "[num_tokens, top_k]");
  const auto dtype = weights.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == like.scalar_type(),
              op,
              ": weights must be float32, float64 or the dtype of ",
              like_name,
              " (",
              like.scalar_type(),
              "), got ",
              dtype);
  check_same_device(op, "weights", weights, like_name, like);
}

void check_unpermute(const at::Tensor& rows, const at::Tensor& weights, const DispatchPlan& plan) {
  constexpr auto op = "unpermute";
  check_dim(op, "rows", rows, 2, "[num_rows, hidden_size]");
  check_floating(op, "rows", rows);
  check_plan(op, plan, "rows", rows);
  check_shape(op,
              "rows",
              rows,
              {plan.row_to_slot.sym_size(0), rows.sym_size(1)},
              "[num_rows, hidden_size]");
  check_weights(op, weights, plan.slot_to_row, "rows", rows);
}

void check_unpermute_backward(const at::Tensor& grad,
                              const at::Tensor& rows,
                              const at::Tensor& weights,
                              const DispatchPlan& plan) {
  check_unpermute(rows, weights, plan);
  constexpr auto op = "_unpermute_backward";
  check_shape(op,
              "grad",
              grad,
              {plan.slot_to_row.sym_size(0), rows.sym_size(1)},
              "[num_tokens, hidden_size]");
  check_gradient(op, grad, "rows", rows);
}

namespace {

at::Tensor unpermute_meta(const at::Tensor& rows,
                          const at::Tensor& weights,
                          const DispatchPlan& plan) {
  check_unpermute(rows, weights, plan);
  return at::empty_symint({plan.slot_to_row.sym_size(0), rows.sym_size(1)}, rows.options());
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward_meta(const at::Tensor& grad,
                                                           const at::Tensor& rows,
                                                           const at::Tensor& weights,
                                                           const DispatchPlan& plan) {
  check_unpermute_backward(grad, rows, weights, plan);
  return {at::empty_symint(rows.sym_sizes(), rows.options()),
          at::empty_symint(weights.sym_sizes(), weights.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("unpermute", with_records<&unpermute_meta>);
  m.impl("_unpermute_backward", with_records<&unpermute_backward_meta>);
}

}  // namespace torchmoe
