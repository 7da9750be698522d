#include "nn/experts.h"

#include <cmath>
#include <ostream>
#include <string>

#include <torch/nn/init.h>

#include "common/activation.h"
#include "common/tensors.h"
#include "common/vocabulary.h"
#include "nn/detail/checks.h"
#include "ops/expert_mlp.h"

namespace torchmoe::nn {

ExpertsImpl::ExpertsImpl(const ExpertsOptions& options) : options_(options) {
  check_at_least("Experts", "hidden_size", options.hidden_size(), 1);
  check_at_least("Experts", "intermediate_size", options.intermediate_size(), 1);
  check_at_least("Experts", "num_experts", options.num_experts(), 1);
  choose<Activation>("Experts", options.activation());
  reset();
}

void ExpertsImpl::reset() {
  const bool gated = is_gated(choose<Activation>("Experts", options_.activation()));
  const std::string name_in = gated ? "gate_up_proj" : "up_proj";
  const int64_t experts = options_.num_experts();
  const int64_t hidden = options_.hidden_size();
  const int64_t inner = options_.intermediate_size();
  const int64_t rows_in = gated ? 2 * inner : inner;
  w_in = register_parameter(name_in, at::empty({experts, rows_in, hidden}), learns(w_in));
  if (options_.bias()) {
    b_in = register_parameter(name_in + "_bias", at::empty({experts, rows_in}), learns(b_in));
  }
  w_out = register_parameter("down_proj", at::empty({experts, hidden, inner}), learns(w_out));
  if (options_.bias()) {
    b_out = register_parameter("down_proj_bias", at::empty({experts, hidden}), learns(b_out));
  }
  reset_parameters();
}

void ExpertsImpl::reset_parameters() {
  const auto initialize = [](const at::Tensor& weight, const at::Tensor& bias) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(weight.size(2)));
    torch::nn::init::uniform_(weight, -bound, bound);
    if (bias.defined()) {
      torch::nn::init::uniform_(bias, -bound, bound);
    }
  };
  initialize(w_in, b_in);
  initialize(w_out, b_out);
}

void ExpertsImpl::pretty_print(std::ostream& stream) const {
  stream << "torchmoe::nn::Experts(hidden_size=" << options_.hidden_size()
         << ", intermediate_size=" << options_.intermediate_size()
         << ", num_experts=" << options_.num_experts() << ", activation=" << options_.activation()
         << (options_.bias() ? ", bias=true)" : ")");
}

at::Tensor ExpertsImpl::forward(const at::Tensor& x,
                                const at::Tensor& indices,
                                const at::Tensor& weights) {
  return expert_mlp(x, indices, weights, this->weights(), options_.activation());
}

ExpertParameters ExpertsImpl::weights() const {
  return {w_in, if_defined(b_in), w_out, if_defined(b_out)};
}

}  // namespace torchmoe::nn
