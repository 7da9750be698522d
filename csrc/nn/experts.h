// E feed-forward networks of one shape, their weights stacked.
#pragma once

#include <iosfwd>

#include <ATen/core/Tensor.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include "options.h"

namespace torchmoe::nn {

/// Parameters `gate_up_proj` [E, 2I, H] (gate rows first; `up_proj` [E, I, H] for a plain
/// activation), `down_proj` [E, H, I] and, on request, `gate_up_proj_bias` or `up_proj_bias` and
/// `down_proj_bias`.
class ExpertsImpl : public torch::nn::Cloneable<ExpertsImpl> {
 public:
  ExpertsImpl(int64_t hidden_size, int64_t intermediate_size, int64_t num_experts)
      : ExpertsImpl(ExpertsOptions(hidden_size, intermediate_size, num_experts)) {}
  explicit ExpertsImpl(const ExpertsOptions& settings);

  void reset() override;
  /// Each expert as two linear layers: uniform in +-1 / sqrt(fan in).
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// x [T, H], indices [T, K], weights [T, K] -> y [T, H]; an id outside [0, E) adds nothing.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& indices, const at::Tensor& weights);

  ExpertsOptions options;
  at::Tensor w_in;   ///< registered as `gate_up_proj` or `up_proj`
  at::Tensor b_in;   ///< undefined without ExpertsOptions::bias
  at::Tensor w_out;  ///< registered as `down_proj`
  at::Tensor b_out;  ///< undefined without ExpertsOptions::bias
};
TORCH_MODULE(Experts);

}  // namespace torchmoe::nn
