#include "nn/router.h"

#include <cmath>
#include <ostream>

#include <torch/nn/init.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "nn/checks.h"
#include "ops/router_logits.h"

namespace torchmoe::nn {

RouterImpl::RouterImpl(const RouterOptions& settings) : options(settings) {
  check_at_least("Router", "hidden_size", options.hidden_size(), 1);
  check_at_least("Router", "num_experts", options.num_experts(), 1);
  check_not_negative("Router", "input_jitter", options.input_jitter());
  check_not_negative("Router", "logit_noise", options.logit_noise());
  reset();
}

void RouterImpl::reset() {
  weight = register_parameter("weight", at::empty({options.num_experts(), options.hidden_size()}));
  if (options.bias()) {
    bias = register_parameter("bias", at::empty({options.num_experts()}));
  }
  reset_parameters();
}

void RouterImpl::reset_parameters() {
  const double bound = 1.0 / std::sqrt(static_cast<double>(options.hidden_size()));
  torch::nn::init::uniform_(weight, -bound, bound);
  if (bias.defined()) {
    torch::nn::init::uniform_(bias, -bound, bound);
  }
}

void RouterImpl::pretty_print(std::ostream& stream) const {
  stream << "torchmoe::nn::Router(hidden_size=" << options.hidden_size()
         << ", num_experts=" << options.num_experts();
  if (options.bias()) {
    stream << ", bias=true";
  }
  if (options.input_jitter() > 0) {
    stream << ", input_jitter=" << options.input_jitter();
  }
  if (options.logit_noise() > 0) {
    stream << ", logit_noise=" << options.logit_noise();
  }
  stream << ")";
}

at::Tensor RouterImpl::forward(const at::Tensor& x) {
  auto input = x;
  auto used_weight = weight;
  auto used_bias = if_defined(bias);
  if (is_training() && options.input_jitter() > 0) {
    // In bfloat16 a factor near 1 would be rounded away; router_logits is float32 inside anyway.
    const auto wide = at::promote_types(accumulate_dtype(x.scalar_type()), weight.scalar_type());
    const auto jitter = at::empty_like(x, x.options().dtype(wide))
                            .uniform_(1 - options.input_jitter(), 1 + options.input_jitter());
    input = x * jitter;
    used_weight = weight.to(wide);
    if (used_bias) {
      used_bias = used_bias->to(wide);
    }
  }
  if (at::promote_types(input.scalar_type(), used_weight.scalar_type()) ==
      used_weight.scalar_type()) {
    input = input.to(used_weight.scalar_type());  // a wide router over narrow tokens
  }
  auto logits = router_logits(input, used_weight, used_bias);
  if (is_training() && options.logit_noise() > 0) {
    logits = logits + options.logit_noise() * at::randn_like(logits);
  }
  return logits;
}

}  // namespace torchmoe::nn
