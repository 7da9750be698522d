// The layer for models that pass on a single tensor.
#pragma once

#include <functional>
#include <iosfwd>

#include <ATen/core/Tensor.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/pimpl.h>

#include "moe.h"

namespace torchmoe::nn {

/// A layer that returns only its hidden states, with its auxiliary loss attached to their graph
/// (see `attach_loss`): for torch::nn::Sequential. The parameters get the same gradients as if
/// aux_loss were added to the task loss.
///
///     WithAttachedLoss layer(MoE(64, 128, 8, 2));
///     layer->on_output = [&](const MoEOutput& output) { routings.push_back(output.routing); };
///     torch::nn::Sequential model(torch::nn::Linear(16, 64), layer, torch::nn::Linear(64, 1));
///     ...
///     layer->moe->update(routings);
class WithAttachedLossImpl : public torch::nn::Cloneable<WithAttachedLossImpl> {
 public:
  /// `scale` is the gradient that the auxiliary loss receives. It must be the factor of the task
  /// loss, if that has one, such as 1 / steps for gradient accumulation by division. Throws
  /// c10::ValueError if it is not finite.
  explicit WithAttachedLossImpl(MoE layer, double scale = 1.0);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// x [..., H] -> the hidden states; arguments as for `MoEImpl::forward`.
  at::Tensor forward(const at::Tensor& x,
                     const at::Tensor& token_mask = {},
                     const at::Tensor& earlier_counts = {});

  double scale() const { return scale_; }
  void set_scale(double scale);

  MoE moe;
  /// Called with the whole output of every forward pass, for `moe->update` and for logs; may be
  /// empty. Copies of the module have none, since it writes to the caller's data.
  std::function<void(const MoEOutput& output)> on_output;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())},
                           {2, torch::nn::AnyValue(at::Tensor())})

 private:
  double scale_;
};
TORCH_MODULE(WithAttachedLoss);

}  // namespace torchmoe::nn
