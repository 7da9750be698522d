#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/orientation.h"
#include "common/output_mask.h"
#include "common/tensors.h"
#include "cuda/device.h"
#include "cuda/gemm/grouped_product.h"
#include "cuda/gemm/tile_map_tensors.h"
#include "ops/grouped_linear.h"

namespace torchmoe {

namespace {

at::Tensor grouped_linear_kernel(const at::Tensor& rows,
                                 const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias,
                                 const at::Tensor& expert_offsets) {
  check_grouped_linear(rows, weight, bias, expert_offsets);
  const cuda::OnDevice device(rows);
  const auto dtype = rows.scalar_type();
  const auto rows_c = rows.contiguous();
  const auto weight_c = oriented(weight);
  const auto bias_c = contiguous_as(bias, dtype);
  auto out = at::empty({rows.size(0), weight.size(1)}, rows.options());
  with_float_type(dtype, [&]<typename scalar_t>() {
    const cuda::TileMapTensors tiles(device.stream(),
                                     expert_offsets,
                                     rows.size(0),
                                     cuda::product_tile_rows<scalar_t>(),
                                     cuda::FirstRow::given);
    cuda::grouped_linear(device.stream(),
                         tiles.map(),
                         cuda::SourceRows<scalar_t>{rows_c.const_data_ptr<scalar_t>()},
                         matrices_of<const scalar_t>(weight_c),
                         data_or_null<scalar_t>(bias_c),
                         out.mutable_data_ptr<scalar_t>(),
                         weight.size(2),
                         weight.size(1));
    cuda::zero_unrouted_rows(
        device.stream(), tiles.map(), out.mutable_data_ptr<scalar_t>(), weight.size(1));
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
  const cuda::OnDevice device(rows);
  const auto dtype = rows.scalar_type();
  const auto grad_c = contiguous_as(grad, dtype);
  const auto rows_c = rows.contiguous();
  const auto weight_c = oriented(weight);
  const int64_t out_features = weight.size(1);
  const int64_t in_features = weight.size(2);
  auto grad_rows = empty_if(output_mask[0], rows.sym_sizes(), rows.options());
  auto grad_weight = empty_oriented_if(output_mask[1], weight);
  auto grad_bias =
      empty_if(output_mask[2], {weight.sym_size(0), weight.sym_size(1)}, rows.options());
  with_float_type(dtype, [&]<typename scalar_t>() {
    const cuda::TileMapTensors tiles(device.stream(),
                                     expert_offsets,
                                     rows.size(0),
                                     cuda::product_tile_rows<scalar_t>(),
                                     cuda::FirstRow::given);
    const cuda::SourceRows<scalar_t> grad_in{grad_c.const_data_ptr<scalar_t>()};
    const cuda::SourceRows<scalar_t> rows_in{rows_c.const_data_ptr<scalar_t>()};
    const at::opmath_type<scalar_t>* unweighted = nullptr;
    if (output_mask[0]) {
      cuda::grouped_linear_grad_rows(device.stream(),
                                     tiles.map(),
                                     grad_in,
                                     matrices_of<const scalar_t>(weight_c),
                                     grad_rows.mutable_data_ptr<scalar_t>(),
                                     in_features,
                                     out_features);
      cuda::zero_unrouted_rows(
          device.stream(), tiles.map(), grad_rows.mutable_data_ptr<scalar_t>(), in_features);
    }
    if (output_mask[1]) {
      cuda::grouped_linear_grad_weight(device.stream(),
                                       tiles.map(),
                                       grad_in,
                                       rows_in,
                                       matrices_of<scalar_t>(grad_weight),
                                       in_features,
                                       out_features);
    }
    if (output_mask[2]) {
      cuda::grouped_linear_grad_bias(device.stream(),
                                     tiles.map(),
                                     grad_in,
                                     unweighted,
                                     grad_bias.mutable_data_ptr<scalar_t>(),
                                     out_features);
    }
  });
  return {grad_rows, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("grouped_linear", &grouped_linear_kernel);
  m.impl("_grouped_linear_backward", &grouped_linear_backward_kernel);
}

}  // namespace torchmoe
