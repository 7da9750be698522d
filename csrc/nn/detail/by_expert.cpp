#include "nn/detail/by_expert.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>

namespace torchmoe::nn {

at::ScalarType wide_type(at::ScalarType dtype) {
  return at::promote_types(at::kFloat, dtype);
}

at::Tensor wide(const at::Tensor& values) {
  return values.to(wide_type(values.scalar_type()));
}

at::Tensor count(const at::Tensor& indices, int64_t num_experts) {
  auto sizes = indices.sizes().vec();
  sizes.back() = num_experts + 1;
  const auto routed = indices.ge(0).logical_and_(indices.lt(num_experts));
  const auto ids = at::where(routed, indices, num_experts);
  return indices.new_zeros(sizes)
      .scatter_add_(-1, ids, at::ones_like(ids))
      .narrow(-1, 0, num_experts);
}

at::Tensor shares(const at::Tensor& counts, at::ScalarType dtype) {
  if (counts.is_floating_point()) {
    return counts.to(dtype);
  }
  return counts.to(dtype) / counts.sum(-1, /*keepdim=*/true).clamp_min(1);
}

at::Tensor named(const at::Tensor& indices, int64_t num_experts) {
  return count(indices, num_experts).gt(0);
}

}  // namespace torchmoe::nn
