// E feed-forward networks of one shape, their weights stacked.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include "../ops/expert_parameters.h"

namespace torchmoe::nn {

/// What experts are built from.
struct ExpertsOptions {
  ExpertsOptions(int64_t hidden_size, int64_t intermediate_size, int64_t num_experts)
      : hidden_size_(hidden_size),
        intermediate_size_(intermediate_size),
        num_experts_(num_experts) {}

  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, intermediate_size);
  TORCH_ARG(int64_t, num_experts);
  /// "swiglu", "geglu" or "reglu", down_proj(act(gate) * up), or "gelu", "gelu_tanh", "relu" or
  /// "silu", down_proj(act(up)); see `expert_mlp`.
  TORCH_ARG(std::string, activation) = "swiglu";
  /// Gives both projections a learned bias.
  TORCH_ARG(bool, bias) = false;
};

/// In the layout of Hugging Face Transformers v5: parameters `gate_up_proj` [E, 2I, H] (gate rows
/// first; `up_proj` [E, I, H] for a plain activation), `down_proj` [E, H, I] and, on request,
/// `gate_up_proj_bias` or `up_proj_bias` and `down_proj_bias`. The members have the ops' names.
class ExpertsImpl : public torch::nn::Cloneable<ExpertsImpl> {
 public:
  ExpertsImpl(int64_t hidden_size, int64_t intermediate_size, int64_t num_experts)
      : ExpertsImpl(ExpertsOptions(hidden_size, intermediate_size, num_experts)) {}
  /// Throws c10::ValueError if a size is below 1 or the activation is unknown.
  explicit ExpertsImpl(const ExpertsOptions& options);

  void reset() override;
  /// Each expert as two linear layers: uniform in +-1 / sqrt(fan in).
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// x [T, H] in the dtype of the parameters, indices [T, K] int64, weights [T, K] -> y [T, H] in
  /// the dtype of x (under autocast, in its dtype); an id outside [0, E) adds nothing.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& indices, const at::Tensor& weights);

  const ExpertsOptions& options() const { return options_; }
  /// The matrices and biases, as the ops take them.
  ExpertParameters weights() const;

  at::Tensor w_in;   ///< registered as `gate_up_proj` or `up_proj`
  at::Tensor b_in;   ///< undefined without ExpertsOptions::bias
  at::Tensor w_out;  ///< registered as `down_proj`
  at::Tensor b_out;  ///< undefined without ExpertsOptions::bias

 private:
  ExpertsOptions options_;
};
TORCH_MODULE(Experts);

}  // namespace torchmoe::nn
