#include "nn/shared_experts.h"

#include <ostream>

#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "nn/detail/by_expert.h"

namespace torchmoe::nn {

SharedExpertsImpl::SharedExpertsImpl(const SharedExpertsOptions& options) : options_(options) {
  reset();
}

void SharedExpertsImpl::reset() {
  experts = register_module(
      "experts",
      Experts(ExpertsOptions(options_.hidden_size(), options_.intermediate_size(), 1)
                  .activation(options_.activation())
                  .bias(options_.bias())));
}

void SharedExpertsImpl::reset_parameters() {
  experts->reset_parameters();
}

void SharedExpertsImpl::pretty_print(std::ostream& stream) const {
  stream << "torchmoe::nn::SharedExperts()";
}

at::Tensor SharedExpertsImpl::forward(const at::Tensor& x) {
  const auto first = at::zeros({x.size(0), 1}, x.options().dtype(at::kLong));
  const auto weights = at::ones({x.size(0), 1}, x.options().dtype(wide_type(x.scalar_type())));
  return experts->forward(x, first, weights);
}

}  // namespace torchmoe::nn
