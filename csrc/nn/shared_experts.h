// Experts that serve every token.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include "experts.h"

namespace torchmoe::nn {

/// What shared experts are built from.
struct SharedExpertsOptions {
  SharedExpertsOptions(int64_t hidden_size, int64_t intermediate_size)
      : hidden_size_(hidden_size), intermediate_size_(intermediate_size) {}

  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, intermediate_size);
  /// See `ExpertsOptions`, also for bias.
  TORCH_ARG(std::string, activation) = "swiglu";
  TORCH_ARG(bool, bias) = false;
};

/// A feed-forward network like one expert of `Experts`, for MoEOptions::shared_experts. Several
/// shared experts equal one whose width is their sum (DeepSeekMoE, arXiv 2401.06066).
class SharedExpertsImpl : public torch::nn::Cloneable<SharedExpertsImpl> {
 public:
  SharedExpertsImpl(int64_t hidden_size, int64_t intermediate_size)
      : SharedExpertsImpl(SharedExpertsOptions(hidden_size, intermediate_size)) {}
  /// Throws c10::ValueError if a size is below 1 or the activation is unknown.
  explicit SharedExpertsImpl(const SharedExpertsOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// x [T, H] in the dtype of the parameters -> [T, H] in x's dtype (under autocast, in its dtype).
  at::Tensor forward(const at::Tensor& x);

  Experts experts{nullptr};  ///< the network, as `Experts` with a single expert

 private:
  SharedExpertsOptions options_;
};
TORCH_MODULE(SharedExperts);

}  // namespace torchmoe::nn
