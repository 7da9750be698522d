#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/orientation.h"
#include "common/output_mask.h"
#include "common/tensors.h"
#include "cpu/empty_pages.h"
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
  const auto rows_c = rows.contiguous();
  const auto weight_c = oriented(weight);
  const auto bias_c = contiguous(bias);
  const auto offsets = cpu::read_offsets(expert_offsets, rows.size(0));
  const int64_t out_features = weight.size(1);
  const int64_t in_features = weight.size(2);
  auto out = cpu::empty_pages({rows.size(0), out_features}, rows.options());
  with_float_type(rows.scalar_type(), [&]<typename scalar_t>() {
    auto* result = out.mutable_data_ptr<scalar_t>();
    zero_unrouted(offsets, result, rows.size(0), out_features);
    cpu::Phase tasks;
    cpu::grouped_linear(tasks,
                        offsets,
                        cpu::Rows<scalar_t>{rows_c.const_data_ptr<scalar_t>(), in_features},
                        cpu::Linear<scalar_t>{matrices_of<const scalar_t>(weight_c),
                                              data_or_null<scalar_t>(bias_c)},
                        result,
                        in_features,
                        out_features);
    cpu::run(std::move(tasks), rows.size(0) * in_features * out_features);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward_kernel(
    const at::Tensor& grad,
    const at::Tensor& rows,
    const at::Tensor& weight,
    const at::Tensor& expert_offsets,
    std::array<bool, 3> output_mask) {
  check_grouped_linear_backward(grad, rows, weight, expert_offsets);
  const auto dtype = rows.scalar_type();
  const auto grad_c = contiguous_as(grad, dtype);
  const auto rows_c = rows.contiguous();
  const auto weight_c = oriented(weight);
  const auto offsets = cpu::read_offsets(expert_offsets, rows.size(0));
  const int64_t out_features = weight.size(1);
  const int64_t in_features = weight.size(2);
  auto grad_rows = empty_if(output_mask[0], rows.sym_sizes(), rows.options());
  auto grad_weight = cpu::in_large_pages(empty_oriented_if(output_mask[1], weight));
  auto grad_bias =
      empty_if(output_mask[2], {weight.sym_size(0), weight.sym_size(1)}, rows.options());
  with_float_type(dtype, [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    const cpu::Rows<scalar_t> g{grad_c.const_data_ptr<scalar_t>(), out_features};
    cpu::Phase tasks;
    if (output_mask[0]) {
      auto* result = grad_rows.mutable_data_ptr<scalar_t>();
      zero_unrouted(offsets, result, rows.size(0), in_features);
      cpu::grouped_linear_grad_rows(tasks,
                                    offsets,
                                    g,
                                    matrices_of<const scalar_t>(weight_c),
                                    result,
                                    in_features,
                                    out_features);
    }
    if (output_mask[1]) {
      cpu::grouped_linear_grad_weight(
          tasks,
          offsets,
          g,
          cpu::Rows<scalar_t>{rows_c.const_data_ptr<scalar_t>(), in_features},
          matrices_of<scalar_t>(grad_weight),
          in_features,
          out_features);
    }
    if (output_mask[2]) {
      const Acc* unweighted = nullptr;
      cpu::grouped_linear_grad_bias(
          tasks, offsets, g, unweighted, grad_bias.mutable_data_ptr<scalar_t>(), out_features);
    }
    // An idle expert's gradient is written too.
    cpu::run(std::move(tasks), 2 * rows.size(0) * in_features * out_features + weight.numel());
  });
  return {grad_rows, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("grouped_linear", &grouped_linear_kernel);
  m.impl("_grouped_linear_backward", &grouped_linear_backward_kernel);
}

}  // namespace torchmoe
