#include "nn/router.h"

#include <cmath>
#include <ostream>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn_like.h>
#include <torch/nn/init.h>

#include "common/tensors.h"
#include "nn/detail/by_expert.h"
#include "nn/detail/checks.h"
#include "ops/router_logits.h"

namespace torchmoe::nn {

RouterImpl::RouterImpl(const RouterOptions& options) : options_(options) {
  check_at_least("Router", "hidden_size", options.hidden_size(), 1);
  check_at_least("Router", "num_experts", options.num_experts(), 1);
  set_input_jitter(options.input_jitter());
  set_logit_noise(options.logit_noise());
  usage_scaling_ = options.usage_scaling();
  reset();
}

void RouterImpl::set_input_jitter(double level) {
  check_not_negative("Router", "input_jitter", level);
  options_.input_jitter(level);
}

void RouterImpl::set_logit_noise(double level) {
  check_not_negative("Router", "logit_noise", level);
  options_.logit_noise(level);
}

void RouterImpl::reset() {
  const int64_t experts = options_.num_experts();
  weight =
      register_parameter("weight", at::empty({experts, options_.hidden_size()}), learns(weight));
  if (options_.bias()) {
    bias = register_parameter("bias", at::empty({experts}), learns(bias));
  }
  if (options_.usage_scaling() || options_.track_usage()) {
    usage = register_wide_buffer("usage", at::empty({experts}));
  }
  reset_parameters();
}

void RouterImpl::reset_parameters() {
  const double bound = 1.0 / std::sqrt(static_cast<double>(options_.hidden_size()));
  torch::nn::init::uniform_(weight, -bound, bound);
  if (bias.defined()) {
    torch::nn::init::uniform_(bias, -bound, bound);
  }
  if (usage.defined()) {
    torch::nn::init::constant_(usage, 1.0 / static_cast<double>(options_.num_experts()));
  }
}

void RouterImpl::pretty_print(std::ostream& stream) const {
  stream << "torchmoe::nn::Router(hidden_size=" << options_.hidden_size()
         << ", num_experts=" << options_.num_experts();
  if (options_.bias()) {
    stream << ", bias=true";
  }
  if (options_.input_jitter() > 0) {
    stream << ", input_jitter=" << options_.input_jitter();
  }
  if (options_.logit_noise() > 0) {
    stream << ", logit_noise=" << options_.logit_noise();
  }
  if (options_.usage_scaling()) {
    stream << ", usage_scaling=true";
  } else if (options_.track_usage()) {
    stream << ", track_usage=true";
  }
  stream << ")";
}

RouterOutput RouterImpl::score(const at::Tensor& x) {
  auto input = x;
  auto used_weight = scale_by_usage(weight);
  auto used_bias = if_defined(bias);
  if (is_training() && options_.input_jitter() > 0) {
    // In bfloat16 a factor near 1 would be rounded away; router_logits is float32 inside anyway.
    const auto dtype = wide_type(at::promote_types(x.scalar_type(), weight.scalar_type()));
    const auto jitter = at::empty_like(x, x.options().dtype(dtype))
                            .uniform_(1 - options_.input_jitter(), 1 + options_.input_jitter());
    input = x * jitter;
    used_weight = used_weight.to(dtype);
    if (used_bias) {
      used_bias = used_bias->to(dtype);
    }
  }
  if (at::promote_types(input.scalar_type(), used_weight.scalar_type()) ==
      used_weight.scalar_type()) {
    input = input.to(used_weight.scalar_type());  // a wide router over narrow tokens
  }
  const auto clean = router_logits(input, used_weight, used_bias);
  if (!is_training() || options_.logit_noise() == 0) {
    return {clean};
  }
  const auto noise = at::randn_like(clean);
  return {clean + options_.logit_noise() * noise, clean, options_.logit_noise()};
}

}  // namespace torchmoe::nn
