#include "nn/detail/by_expert.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/ones_like.h>

namespace torchmoe::nn {

at::ScalarType wide_type(at::ScalarType dtype) {
  return at::promote_types(at::kFloat, dtype);
}

at::Tensor wide(const at::Tensor& values) {
  return values.to(wide_type(values.scalar_type()));
}

at::Tensor count(const at::Tensor& indices, int64_t num_experts) {
  auto sizes = indices.sizes().vec();
  // An expert's place is between one for smaller ids and one for larger ones.
  const auto bins = indices.clamp(-1, num_experts).add_(1);
  sizes.back() = num_experts + 2;
  return indices.new_zeros(sizes)
      .scatter_add_(-1, bins, at::ones_like(bins))
      .narrow(-1, 1, num_experts);
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
