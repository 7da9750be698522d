#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "cuda/device.h"
#include "cuda/gemm/grouped_product.h"
#include "cuda/gemm/tile_map_tensors.h"
#include "ops/sum_by_expert.h"

namespace torchmoe {

namespace {

at::Tensor sum_by_expert_kernel(const at::Tensor& rows, const at::Tensor& expert_offsets) {
  check_sum_by_expert(rows, expert_offsets);
  const cuda::OnDevice device(rows);
  const auto rows_c = rows.contiguous();
  auto sums = at::empty({expert_offsets.size(0) - 1, rows.size(1)}, rows.options());
  with_float_type(rows.scalar_type(), [&]<typename scalar_t>() {
    const cuda::TileMapTensors tiles(device.stream(),
                                     expert_offsets,
                                     rows.size(0),
                                     cuda::product_tile_rows<scalar_t>(),
                                     cuda::FirstRow::given);
    const at::opmath_type<scalar_t>* unweighted = nullptr;
    cuda::grouped_linear_grad_bias(device.stream(),
                                   tiles.map(),
                                   cuda::SourceRows<scalar_t>{rows_c.const_data_ptr<scalar_t>()},
                                   unweighted,
                                   sums.mutable_data_ptr<scalar_t>(),
                                   rows.size(1));
  });
  return sums;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("sum_by_expert", &sum_by_expert_kernel);
}

}  // namespace torchmoe
