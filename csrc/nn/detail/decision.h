// The second and third step of MoEImpl::forward: which experts, what the full ones drop, and the
// weights.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include "nn/moe.h"

namespace torchmoe::nn {

/// The ids of a forward pass, from the choice to the dispatch.
struct Choice {
  at::Tensor chosen;                  ///< [T, K]: the estimator's own
  at::Tensor selected;                ///< [T, K']: with assistance one more column, else the same
  at::Tensor indices;                 ///< [T, K']: as routed
  at::Tensor weighed;                 ///< [T, K']: those that weights are formed for
  std::optional<at::Tensor> weights;  ///< [T, K']: of `weighed`, where they had to be known before
  /// Whether every chosen slot is routed as it was chosen, so that counts are the same.
  bool is_kept;
};

/// Selection, assistance and capacity. `counted` is how many tokens count, where there is a mask;
/// `backup` [E] the capacity's table, undefined without one.
Choice decide(MoEImpl& layer,
              const at::Tensor& logits,
              const std::optional<at::Tensor>& token_mask,
              const std::optional<at::Tensor>& counted,
              const at::Tensor& backup);

/// The weights of the slots. Constant ones would leave a router that could learn untrained, which
/// gate_weights refuses where the logits want a gradient. They may want one for the sake of x
/// alone: to a router that is frozen a gradient of zero is no loss.
at::Tensor weigh(MoEImpl& layer, const at::Tensor& logits, const at::Tensor& ids);

}  // namespace torchmoe::nn
