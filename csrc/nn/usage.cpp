#include "nn/usage.h"

#include <ATen/ops/where.h>
#include <torch/utils.h>

#include "nn/detail/by_expert.h"
#include "nn/detail/checks.h"
#include "ops/scale_gradient.h"

namespace torchmoe::nn {

void UsageTracking::update(const at::Tensor& tokens_per_expert, const at::Tensor& num_slots) {
  if (!usage.defined()) {
    return;
  }
  const auto owner = class_name(typeid(*this));
  TORCH_CHECK_VALUE(usage_decay >= 0 && usage_decay < 1,
                    owner,
                    ": usage_decay must be in [0, 1), got ",
                    shown(usage_decay));
  check_counts(owner, "tokens_per_expert", tokens_per_expert, usage.size(0), usage.device());
  const torch::NoGradGuard no_grad;
  const auto share = tokens_per_expert.to(usage.scalar_type()) / num_slots.clamp_min(1);
  const auto moved = usage_decay * usage + (1 - usage_decay) * share;
  usage.copy_(at::where(num_slots.gt(0), moved, usage));
}

at::Tensor UsageTracking::scale_by_usage(const at::Tensor& weight) const {
  if (!usage_scaling_ || !usage.defined()) {
    return weight;
  }
  return scale_gradient(weight, (1 - wide(usage)).unsqueeze(-1));
}

}  // namespace torchmoe::nn
