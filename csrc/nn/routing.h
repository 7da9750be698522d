// What a layer returns: values, never state.
#pragma once

#include <map>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>

namespace torchmoe::nn {

/// What the layer decided and how it accounts for it; T counts the flattened tokens. With
/// assistance there are K + 1 columns instead of K, the last one for the slots that it adds.
/// Logits, weights and losses are part of the graph, not detached, so you can form your own losses
/// from them.
struct Routing {
  at::Tensor logits;    ///< [T, E], float32 or wider; meaningless where token_mask is false
  at::Tensor weights;   ///< [T, K]; the weight of a dropped slot is ignored
  at::Tensor selected;  ///< [T, K] int64: ids before capacity, -1 for masked tokens
  at::Tensor indices;   ///< [T, K] int64: as routed, -1 where dropped, another id where rerouted
  std::optional<at::Tensor> token_mask;  ///< [T] bool; nullopt if all tokens count
  at::Tensor
      tokens_per_expert;       ///< [E] int64: the router's own choices, before dropping, rerouting
                               ///< and assistance
  at::Tensor kept_per_expert;  ///< [E] int64: slots per expert after these
  /// The unweighted terms of aux_loss by name: "load_balancing_loss", "router_z_loss" if its weight
  /// is above 0, and those of Balance::losses.
  std::map<std::string, at::Tensor> losses;
};

struct MoEOutput {
  at::Tensor hidden_states;  ///< like x
  at::Tensor aux_loss;       ///< weighted sum of the losses: a scalar, ready to add to the task's
  Routing routing;
};

}  // namespace torchmoe::nn
