// The experts' usage, which routers with a parameter for each expert have in common.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace torchmoe::nn {

/// A second base, in addition to torch::nn::Module, of a router that keeps the running average of
/// each expert's share of the slots. Such a router registers `usage` in its `reset`:
///
///     struct MyRouterImpl : torchmoe::nn::Remembering<MyRouterImpl>, torchmoe::nn::UsageTracking {
///       MyRouterImpl() { reset(); }
///       void reset() override {
///         weight = register_parameter("weight", torch::randn({8, 64}));
///         usage = register_wide_buffer("usage", torch::full({8}, 1.0 / 8));
///       }
///       torch::Tensor forward(const torch::Tensor& x) { return x.matmul(weight.t()); }
///       torch::Tensor weight;
///     };
class UsageTracking {
 public:
  UsageTracking() = default;
  UsageTracking(const UsageTracking&) = default;
  UsageTracking(UsageTracking&&) = default;
  UsageTracking& operator=(const UsageTracking&) = default;
  UsageTracking& operator=(UsageTracking&&) = default;
  virtual ~UsageTracking() = default;

  /// Moves usage towards the shares of one step; `MoEImpl::update` calls it.
  ///
  ///     usage <- usage_decay * usage + (1 - usage_decay) * tokens_per_expert / num_slots
  ///
  /// tokens_per_expert [E] counts >= 0, summed over micro-batches and processes; num_slots an
  /// integer scalar, their sum. Does nothing if no usage is kept, or if no token was counted.
  /// Throws c10::Error if the counts have another shape or device, c10::ValueError if one is
  /// negative or usage_decay is out of range.
  void update(const at::Tensor& tokens_per_expert, const at::Tensor& num_slots);

  /// The weight [E, ...]; with usage_scaling the gradient of row i is times 1 - usage_i.
  at::Tensor scale_by_usage(const at::Tensor& weight) const;

  /// Whether `scale_by_usage` does anything.
  bool usage_scaling() const { return usage_scaling_; }

  /// Weight of the past in the running average; must be in [0, 1).
  double usage_decay = 0.99;
  at::Tensor usage;  ///< [E] buffer, float32 or wider; undefined where none is kept

 protected:
  bool usage_scaling_ = false;
};

}  // namespace torchmoe::nn
