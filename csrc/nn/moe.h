// The mixture-of-experts layer: decide, weigh, compute, account.
#pragma once

#include <iosfwd>
#include <map>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/pimpl.h>

#include "capacity.h"
#include "experts.h"
#include "options.h"
#include "router.h"

namespace torchmoe::nn {

/// What one forward decided, for losses and statistics of the caller's own. T tokens after
/// flattening. The logits, weights and losses are the graph's own tensors.
struct Routing {
  at::Tensor logits;    ///< [T, E]; of no meaning where token_mask is false
  at::Tensor weights;   ///< [T, K]; the weight of a dropped slot is ignored
  at::Tensor selected;  ///< [T, K] int64: ids before capacity, -1 for masked tokens
  at::Tensor indices;   ///< [T, K] int64: as routed, -1 where dropped, another id where rerouted
  std::optional<at::Tensor> token_mask;  ///< [T] bool
  at::Tensor tokens_per_expert;          ///< [E] int64: slots before any dropping
  at::Tensor kept_per_expert;            ///< [E] int64: slots after it
  /// The unweighted terms by the name of their op; router_z_loss only when weighted.
  std::map<std::string, at::Tensor> losses;
};

struct MoEOutput {
  at::Tensor hidden_states;  ///< like x
  at::Tensor aux_loss;       ///< weighted sum of the losses, ready to add to the task's
  Routing routing;
};

/// Submodules `router` and `experts`.
class MoEImpl : public torch::nn::Cloneable<MoEImpl> {
 public:
  MoEImpl(int64_t hidden_size, int64_t intermediate_size, int64_t num_experts, int64_t top_k)
      : MoEImpl(MoEOptions(hidden_size, intermediate_size, num_experts, top_k)) {}
  explicit MoEImpl(const MoEOptions& settings);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// x [..., H]; token_mask has x's leading dimensions, true where a token counts. A masked token
  /// gets y = 0, no gradient, and no place in counts, capacity and losses.
  MoEOutput forward(const at::Tensor& x,
                    const std::optional<at::Tensor>& token_mask = std::nullopt);

  MoEOptions options;
  Router router{nullptr};
  Experts experts{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<at::Tensor>())})

 private:
  at::Tensor limit(const Routing& routing, const std::optional<at::Tensor>& counted) const;
  std::map<std::string, at::Tensor> losses(const Routing& routing) const;

  std::optional<CapacityFactor> factor_;
  std::optional<CapacityFactor> eval_factor_;
  at::Tensor backup_;  ///< CapacityOptions::backup, undefined without capacity
};
TORCH_MODULE(MoE);

}  // namespace torchmoe::nn
