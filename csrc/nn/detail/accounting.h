// The fifth step of MoEImpl::forward: counts and losses.
#pragma once

#include <map>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>

#include "nn/detail/decision.h"
#include "nn/moe.h"

namespace torchmoe::nn {

/// What a forward pass comes to.
struct Account {
  at::Tensor tokens_per_expert;              ///< [E] int64: the router's own choices
  at::Tensor kept_per_expert;                ///< [E] int64: as routed
  at::Tensor aux_loss;                       ///< the weighted sum of the losses
  std::map<std::string, at::Tensor> losses;  ///< the terms by name, unweighted
};

/// Counts the slots and forms the losses. `leading` are the leading dimensions of the layer's
/// input; the others are as for `decide` and `MoEImpl::forward`.
Account account(const MoEImpl& layer,
                const RouterOutput& routed,
                const Choice& choice,
                const at::Tensor& weights,
                const std::optional<at::Tensor>& token_mask,
                const std::optional<at::Tensor>& counted,
                at::IntArrayRef leading,
                const std::optional<at::Tensor>& earlier_counts);

/// The sum of the counts [E] over the processes of the layer.
at::Tensor over_processes(const MoEImpl& layer, const at::Tensor& counts);

}  // namespace torchmoe::nn
