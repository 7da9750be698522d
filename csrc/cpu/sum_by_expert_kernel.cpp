#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "cpu/gemm/grouped_product.h"
#include "ops/sum_by_expert.h"

namespace torchmoe {

namespace {

at::Tensor sum_by_expert_kernel(const at::Tensor& rows, const at::Tensor& expert_offsets) {
  check_sum_by_expert(rows, expert_offsets);
  const auto rows_c = rows.contiguous();
  const auto offsets = cpu::read_offsets(expert_offsets, rows.size(0));
  auto sums = at::empty({expert_offsets.size(0) - 1, rows.size(1)}, rows.options());
  with_float_type(rows.scalar_type(), [&]<typename scalar_t>() {
    const at::opmath_type<scalar_t>* unweighted = nullptr;
    cpu::Phase tasks;
    cpu::grouped_linear_grad_bias(
        tasks,
        offsets,
        cpu::Rows<scalar_t>{rows_c.const_data_ptr<scalar_t>(), rows.size(1)},
        unweighted,
        sums.mutable_data_ptr<scalar_t>(),
        rows.size(1));
    cpu::run(std::move(tasks), rows.numel() + sums.numel());
  });
  return sums;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("sum_by_expert", &sum_by_expert_kernel);
}

}  // namespace torchmoe
