#include "ops/grouped_linear.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/find_op.h"
#include "common/orientation.h"
#include "common/output_mask.h"
#include "ops/dispatch_plan.h"

namespace torchmoe {

at::Tensor grouped_linear(const at::Tensor& rows,
                          const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias,
                          const at::Tensor& expert_offsets) {
  static const auto op = find_op<decltype(grouped_linear)>("torchmoe::grouped_linear");
  return op.call(rows, weight, bias, expert_offsets);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(
    const at::Tensor& grad,
    const at::Tensor& rows,
    const at::Tensor& weight,
    const at::Tensor& expert_offsets,
    std::array<bool, 3> output_mask) {
  static const auto op =
      find_op<decltype(grouped_linear_backward)>("torchmoe::_grouped_linear_backward");
  return op.call(grad, rows, weight, expert_offsets, output_mask);
}

void check_grouped_linear(const at::Tensor& rows,
                          const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias,
                          const at::Tensor& expert_offsets) {
  constexpr auto op = "grouped_linear";
  check_dim(op, "rows", rows, 2, "[num_rows, in_features]");
  check_floating(op, "rows", rows);
  check_dim(op, "weight", weight, 3, "[num_experts, out_features, in_features]");
  check_shape(op,
              "weight",
              weight,
              {weight.sym_size(0), weight.sym_size(1), rows.sym_size(1)},
              "[num_experts, out_features, in_features]");
  check_same_dtype(op, "weight", weight, "rows", rows);
  check_same_device(op, "weight", weight, "rows", rows);
  if (bias) {
    check_shape(
        op, "bias", *bias, {weight.sym_size(0), weight.sym_size(1)}, "[num_experts, out_features]");
    check_same_dtype(op, "bias", *bias, "rows", rows);
    check_same_device(op, "bias", *bias, "rows", rows);
  }
  check_expert_offsets(op, expert_offsets, "rows", rows);
  check_shape(op, "expert_offsets", expert_offsets, {weight.sym_size(0) + 1}, "[num_experts + 1]");
}

void check_grouped_linear_backward(const at::Tensor& grad,
                                   const at::Tensor& rows,
                                   const at::Tensor& weight,
                                   const at::Tensor& expert_offsets) {
  check_grouped_linear(rows, weight, std::nullopt, expert_offsets);
  constexpr auto op = "_grouped_linear_backward";
  check_shape(op, "grad", grad, {rows.sym_size(0), weight.sym_size(1)}, "[num_rows, out_features]");
  check_gradient(op, grad, "rows", rows);
}

namespace {

at::Tensor grouped_linear_meta(const at::Tensor& rows,
                               const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias,
                               const at::Tensor& expert_offsets) {
  check_grouped_linear(rows, weight, bias, expert_offsets);
  return at::empty_symint({rows.sym_size(0), weight.sym_size(1)}, rows.options());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward_meta(
    const at::Tensor& grad,
    const at::Tensor& rows,
    const at::Tensor& weight,
    const at::Tensor& expert_offsets,
    std::array<bool, 3> output_mask) {
  check_grouped_linear_backward(grad, rows, weight, expert_offsets);
  return {empty_if(output_mask[0], rows.sym_sizes(), rows.options()),
          empty_oriented_if(output_mask[1], weight),
          empty_if(output_mask[2], {weight.sym_size(0), weight.sym_size(1)}, weight.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("grouped_linear", &grouped_linear_meta);
  m.impl("_grouped_linear_backward", &grouped_linear_backward_meta);
}

}  // namespace torchmoe
