// The router: one logit per token and expert.
#pragma once

#include <iosfwd>

#include <ATen/core/Tensor.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include "options.h"

namespace torchmoe::nn {

/// Parameters `weight` [E, H] and, on request, `bias` [E].
class RouterImpl : public torch::nn::Cloneable<RouterImpl> {
 public:
  RouterImpl(int64_t hidden_size, int64_t num_experts)
      : RouterImpl(RouterOptions(hidden_size, num_experts)) {}
  explicit RouterImpl(const RouterOptions& settings);

  void reset() override;
  /// Uniform in +-1 / sqrt(H), as a linear layer.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// x [T, H] -> logits [T, E], float32 (float64 for float64). Jitter and noise act in training
  /// only.
  at::Tensor forward(const at::Tensor& x);

  RouterOptions options;
  at::Tensor weight;
  at::Tensor bias;  ///< undefined without RouterOptions::bias
};
TORCH_MODULE(Router);

}  // namespace torchmoe::nn
