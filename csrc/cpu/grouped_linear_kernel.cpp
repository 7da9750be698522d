#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/output_mask.h"
#include "common/tensors.h"
#include "cpu/gemm/grouped_product.h"
#include "ops/grouped_linear.h"

namespace torchmoe {

namespace {

/// Rows that no expert owns are 0.
template <typename T>
void zero_unrouted(const cpu::Offsets& offsets, T* rows, int64_t num_rows, int64_t width) {
  std::fill(rows, rows + offsets.front() * width, T(0));
  std::fill(rows + offsets.back() * width, rows + num_rows * width, T(0));
}

at::Tensor grouped_linear_kernel(const at::Tensor& rows,
                                 const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias,
                                 const at::Tensor& expert_offsets) {
  check_grouped_linear(rows, weight, bias, expert_offsets);
  const auto acc = accumulate_dtype(rows.scalar_type());
  const auto rows_acc = contiguous_as(rows, acc);
  const auto weight_acc = contiguous_as(weight, acc);
  const auto bias_acc = contiguous_as(bias, acc);
  const auto offsets = cpu::read_offsets(expert_offsets, rows.size(0));
  auto out = at::empty({rows.size(0), weight.size(1)}, rows.options().dtype(acc));
  AT_DISPATCH_FLOATING_TYPES(acc, "grouped_linear", [&] {
    auto* result = out.mutable_data_ptr<scalar_t>();
    zero_unrouted(offsets, result, rows.size(0), weight.size(1));
    cpu::grouped_linear(offsets,
                        rows_acc.const_data_ptr<scalar_t>(),
                        weight_acc.const_data_ptr<scalar_t>(),
                        data_or_null<scalar_t>(bias_acc),
                        result,
                        weight.size(2),
                        weight.size(1));
  });
  return out.to(rows.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward_kernel(
    const at::Tensor& grad,
    const at::Tensor& rows,
    const at::Tensor& weight,
    const at::Tensor& expert_offsets,
    std::array<bool, 3> output_mask) {
  check_grouped_linear_backward(grad, rows, weight, expert_offsets);
  const auto dtype = rows.scalar_type();
  const auto acc = accumulate_dtype(dtype);
  const auto grad_acc = contiguous_as(grad, acc);
  const auto rows_acc = contiguous_as(rows, acc);
  const auto weight_acc = contiguous_as(weight, acc);
  const auto offsets = cpu::read_offsets(expert_offsets, rows.size(0));
  const int64_t out_features = weight.size(1);
  const int64_t in_features = weight.size(2);
  const auto options = rows.options().dtype(acc);
  auto grad_rows = empty_if(output_mask[0], rows.sym_sizes(), options);
  auto grad_weight = empty_if(output_mask[1], weight.sym_sizes(), options);
  auto grad_bias = empty_if(output_mask[2], {weight.sym_size(0), weight.sym_size(1)}, options);
  AT_DISPATCH_FLOATING_TYPES(acc, "grouped_linear_backward", [&] {
    const auto* g = grad_acc.const_data_ptr<scalar_t>();
    if (output_mask[0]) {
      auto* result = grad_rows.mutable_data_ptr<scalar_t>();
      zero_unrouted(offsets, result, rows.size(0), in_features);
      cpu::grouped_linear_grad_rows(
          offsets, g, weight_acc.const_data_ptr<scalar_t>(), result, in_features, out_features);
    }
    if (output_mask[1]) {
      cpu::grouped_linear_grad_weight(offsets,
                                      g,
                                      rows_acc.const_data_ptr<scalar_t>(),
                                      grad_weight.mutable_data_ptr<scalar_t>(),
                                      in_features,
                                      out_features);
    }
    if (output_mask[2]) {
      cpu::grouped_linear_grad_bias(
          offsets, g, grad_bias.mutable_data_ptr<scalar_t>(), out_features);
    }
  });
  return {grad_rows.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("grouped_linear", &grouped_linear_kernel);
  m.impl("_grouped_linear_backward", &grouped_linear_backward_kernel);
}

}  // namespace torchmoe
