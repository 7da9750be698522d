// The mixture-of-experts layer: decide, weigh, dispatch, compute, account.
#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <memory>
#include <optional>
#include <string>
#include <variant>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <torch/arg.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/pimpl.h>

#include "assistance.h"
#include "balance.h"
#include "capacity.h"
#include "estimator.h"
#include "experts.h"
#include "gate.h"
#include "remembering.h"
#include "replaceable.h"
#include "router.h"
#include "routing.h"
#include "shared_experts.h"

namespace torchmoe::nn {

class UpdateReminder;

/// The linear router of these options, or your own router.
using RouterChoice = std::variant<RouterOptions, TokenFunction>;
/// Shared experts of these options, or your own module or function.
using SharedExpertsChoice = std::variant<SharedExpertsOptions, TokenFunction>;

/// What a layer is built from.
///
///     MoEOptions(512, 1024, /*num_experts=*/8, /*top_k=*/2).capacity(Capacity(1.25))
///
/// Options that hold a module or an estimator itself, not its options, are for one layer: a second
/// layer built from them would share it.
struct MoEOptions {
  MoEOptions(int64_t hidden_size,
             std::optional<int64_t> intermediate_size,
             int64_t num_experts,
             int64_t top_k)
      : hidden_size_(hidden_size),
        intermediate_size_(intermediate_size),
        num_experts_(num_experts),
        top_k_(top_k) {}

  TORCH_ARG(int64_t, hidden_size);
  /// The experts' inner width; may be nullopt when `experts` are given.
  TORCH_ARG(std::optional<int64_t>, intermediate_size);
  TORCH_ARG(int64_t, num_experts);
  /// Experts per token, in [1, num_experts].
  TORCH_ARG(int64_t, top_k);
  /// Of the experts, see `ExpertsOptions`.
  TORCH_ARG(std::string, activation) = "swiglu";
  /// Gives the experts' projections a bias; the router's is RouterOptions::bias.
  TORCH_ARG(bool, bias) = false;
  /// How the weights are formed and how their gradient is estimated.
  TORCH_ARG(Gate, gate);
  /// Limits the slots of an expert; nullopt keeps every slot.
  TORCH_ARG(std::optional<Capacity>, capacity) = std::nullopt;
  /// The terms of aux_loss and the selection bias.
  TORCH_ARG(Balance, balance);
  /// Gives experts under sustained load a backup in one extra slot.
  TORCH_ARG(std::optional<Assistance>, assistance) = std::nullopt;
  /// x [T, H] -> [T, H], added for every token.
  TORCH_ARG(std::optional<SharedExpertsChoice>, shared_experts) = std::nullopt;
  /// Multiplies the routed experts' output, not the shared ones'.
  TORCH_ARG(double, routed_scaling_factor) = 1.0;
  /// nullopt is RouterOptions(hidden_size, num_experts), with usage if something reads it. Your own
  /// module or function maps x [T, H] to logits [T, E]; a module that keeps usage derives from
  /// `UsageTracking`.
  TORCH_ARG(std::optional<RouterChoice>, router) = std::nullopt;
  /// Replaces the experts by a module or function, called as experts(x, indices, weights) -> y [T,
  /// H].
  TORCH_ARG(std::optional<ExpertFunction>, experts) = std::nullopt;
  /// The sum of a tensor of integers over the processes that hold this layer: for
  /// `MoEImpl::update`, and in forward for fraction_from "global_batch". Empty for a single
  /// process.
  TORCH_ARG(std::function<at::Tensor(const at::Tensor& mine)>, all_reduce) = {};
};

/// Routes each token to top_k of num_experts feed-forward networks and adds up their outputs.
///
/// A forward pass changes no buffer and stores nothing. The returned `routing` has everything that
/// `update` needs, which is called once per optimizer step:
///
///     const auto output = moe->forward(x);
///     (task_loss(output.hidden_states) + output.aux_loss).backward();
///     optimizer.step();
///     moe->update(output.routing);
///
/// Submodules: `router`, `experts`, and `shared_experts`, `assistance` and `estimator` if the layer
/// has them. Buffer: `selection_bias`. Names, shapes and values are those of the Python layer, so
/// that state dicts can be exchanged (torchmoe/serialize/state_dict.h). `to` keeps the buffers that
/// move in small steps in float32 or wider.
class MoEImpl : public Remembering<MoEImpl> {
 public:
  MoEImpl(int64_t hidden_size, int64_t intermediate_size, int64_t num_experts, int64_t top_k)
      : MoEImpl(MoEOptions(hidden_size, intermediate_size, num_experts, top_k)) {}
  /// Throws c10::ValueError if a value is out of range or conflicts with another.
  explicit MoEImpl(const MoEOptions& options);

  void reset() override;
  /// Resets the parameters and buffers of the library's parts to initial values; a custom part
  /// keeps its values.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// x [..., H] in the dtype of the parameters -> hidden_states in x's shape: routed_scaling_factor
  /// times the routed experts' output, plus the shared experts' output.
  ///
  /// The other arguments may be undefined tensors. token_mask has x's leading dimensions, bool,
  /// true where a token counts. A masked token gets y = 0 and no gradient, and does not enter
  /// counts, capacity and losses. The values of x there are ignored, NaN included.
  ///
  /// earlier_counts [E] integers, the counts of earlier micro-batches of the same optimizer step in
  /// this process: the sum of their routings' tokens_per_expert (with fraction_choices "first", of
  /// their first choices). They are added to this call's counts before the fractions of
  /// load_balancing_loss are formed. For fraction_from "batch" and "global_batch" only.
  ///
  /// Throws c10::Error if a shape or dtype does not fit, and c10::ValueError if the gate's exact
  /// gradient is zero everywhere (top_k = 1 with normalize "topk", or normalize "uniform").
  MoEOutput forward(const at::Tensor& x,
                    const at::Tensor& token_mask = {},
                    const at::Tensor& earlier_counts = {});

  /// Updates the layer's running state by one step: the router's usage, then which experts are
  /// assisted; and the selection bias. Call it once per optimizer step, with the routing of that
  /// step or with the routings of all its micro-batches, whose counts are summed. With all_reduce
  /// the counts are also summed over the processes, so every process must call it.
  void update(const Routing& routing);
  void update(at::ArrayRef<Routing> routings);

  /// The layer's current options, custom parts included.
  const MoEOptions& options() const { return options_; }
  /// Settings are replaced as whole records, and are checked as when the layer was built.
  void set_balance(const Balance& balance);
  void set_capacity(const std::optional<Capacity>& capacity);
  void set_routed_scaling_factor(double factor);

  /// The parts. `router->as<RouterImpl>()` is the linear router, null if the layer has another.
  const TokenFunction& router() const { return *router_; }
  const ExpertFunction& experts() const { return *experts_; }
  const std::optional<TokenFunction>& shared_experts() const { return shared_experts_; }
  Estimator& estimator() const { return *estimator_; }

  AssistanceState assistance{nullptr};
  /// [E] buffer, float32 or wider, undefined without Balance::selection_bias_rate: experts are
  /// ranked by score_function(logits) + selection_bias. It does not affect the weights.
  at::Tensor selection_bias;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())},
                           {2, torch::nn::AnyValue(at::Tensor())})

  void follow(at::Device device) override;

 private:
  void hold_own_parts();
  void take(const Balance& balance, const std::optional<Capacity>& capacity);

  MoEOptions options_;
  std::optional<TokenFunction> router_;
  std::optional<ExpertFunction> experts_;
  std::optional<TokenFunction> shared_experts_;
  std::shared_ptr<Estimator> estimator_;
  at::Tensor backup_;       // Capacity::backup where it is read, undefined without one
  bool has_parts_ = false;  // whether reset finds the parts of the layer that this one is a copy of
  std::string update_reader_;  // what reads something that update moves, empty where nothing does
  std::shared_ptr<UpdateReminder> reminder_;  // of which copies share one
};
TORCH_MODULE(MoE);

}  // namespace torchmoe::nn
