// The router: one logit per token and expert.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <optional>

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch/nn/pimpl.h>

#include "remembering.h"
#include "usage.h"

namespace torchmoe::nn {

/// What a router is built from.
struct RouterOptions {
  RouterOptions(int64_t hidden_size, int64_t num_experts)
      : hidden_size_(hidden_size), num_experts_(num_experts) {}

  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, num_experts);
  /// Adds a learned bias to the logits.
  TORCH_ARG(bool, bias) = false;
  /// In training the router sees x * u with u uniform in [1 - input_jitter, 1 + input_jitter]
  /// (Switch Transformer, arXiv 2101.03961); the experts see x.
  TORCH_ARG(double, input_jitter) = 0.0;
  /// In training a normal draw of this standard deviation is added to the logits (after Shazeer et
  /// al., arXiv 1701.06538); ranking, weights and losses use the noisy logits.
  TORCH_ARG(double, logit_noise) = 0.0;
  /// Multiplies the gradient of expert i's row of `weight` by 1 - usage_i, so that experts in
  /// frequent use learn to attract tokens more slowly. It needs `usage`.
  TORCH_ARG(bool, usage_scaling) = false;
  /// Keeps `usage`, which `MoEImpl::update` moves, for the parts that read it: a dynamic capacity,
  /// assistance, or the balancing loss with fractions from history.
  TORCH_ARG(bool, track_usage) = false;
};

/// What a router returns.
struct RouterOutput {
  at::Tensor logits;                                      ///< [T, E]
  std::optional<at::Tensor> clean_logits = std::nullopt;  ///< [T, E], before noise was added
  std::optional<double> noise_deviation = std::nullopt;   ///< of that noise, above 0
};

/// Parameters `weight` [E, H] and, on request, `bias` [E]; on request the buffer `usage` [E], the
/// running average of each expert's share of the slots, 1 / E at first. Noise is drawn from torch's
/// default generator.
class RouterImpl : public Remembering<RouterImpl>, public UsageTracking {
 public:
  RouterImpl(int64_t hidden_size, int64_t num_experts)
      : RouterImpl(RouterOptions(hidden_size, num_experts)) {}
  /// Throws c10::ValueError if a size is below 1, or a noise level is negative or not finite.
  explicit RouterImpl(const RouterOptions& options);

  void reset() override;
  /// Uniform in +-1 / sqrt(H), like a linear layer; usage 1 / E.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// x [T, H] in the dtype of weight, or a narrower one -> logits [T, E], float32 (float64 for
  /// float64). Jitter and noise act in training only.
  at::Tensor forward(const at::Tensor& x) { return score(x).logits; }
  /// The same, and the logits before noise.
  RouterOutput score(const at::Tensor& x);

  const RouterOptions& options() const { return options_; }
  void set_input_jitter(double level);
  void set_logit_noise(double level);

  at::Tensor weight;
  at::Tensor bias;  ///< undefined without RouterOptions::bias

 private:
  RouterOptions options_;
};
TORCH_MODULE(Router);

}  // namespace torchmoe::nn
