#include "nn/moe.h"

#include <algorithm>
#include <ostream>
#include <utility>

#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/vocabulary.h"
#include "nn/checks.h"
#include "ops/gate_weights.h"
#include "ops/limit_capacity.h"
#include "ops/load_balancing_loss.h"
#include "ops/router_z_loss.h"
#include "ops/select_experts.h"

namespace torchmoe::nn {
namespace {

void check_gate(const GateOptions& gate) {
  choose<ScoreFunction>("Gate", gate.score_function());
  if (gate.normalize()) {
    choose<Normalize>("Gate", *gate.normalize());
  }
  choose<GateEstimator>("Gate", gate.estimator());
}

void check_capacity(const CapacityOptions& capacity, int64_t num_experts) {
  check_at_least("Capacity", "minimum", capacity.minimum(), 0);
  choose<CapacityOrder>("Capacity", capacity.order());
  const bool needs_backup = choose<Overflow>("Capacity", capacity.overflow()) == Overflow::backup;
  const auto& backup = capacity.backup();
  TORCH_CHECK_VALUE(static_cast<int64_t>(backup.size()) == (needs_backup ? num_experts : 0),
                    "Capacity: backup must have ",
                    needs_backup ? num_experts : 0,
                    " entries with overflow \"",
                    capacity.overflow(),
                    "\", got ",
                    backup.size());
  check_backup("Capacity", backup);
  choose<Normalized>("Capacity", capacity.normalize());
}

void check_router(const RouterOptions& router, int64_t hidden_size, int64_t num_experts) {
  const auto check_equal = [](const char* name, int64_t expected, int64_t actual) {
    TORCH_CHECK_VALUE(
        actual == expected, "MoE: router must have ", name, " ", expected, ", got ", actual);
  };
  check_equal("num_experts", num_experts, router.num_experts());
  check_equal("hidden_size", hidden_size, router.hidden_size());
}

/// x [..., H] and its mask [...] as tokens [T, H] and a mask [T].
std::pair<at::Tensor, std::optional<at::Tensor>> flatten(
    const at::Tensor& x, const std::optional<at::Tensor>& token_mask, int64_t hidden_size) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == hidden_size,
              "MoE: x must be [..., hidden_size] = [..., ",
              hidden_size,
              "], got shape ",
              x.sizes());
  const auto tokens = x.reshape({-1, hidden_size});
  if (!token_mask) {
    return {tokens, std::nullopt};
  }
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  TORCH_CHECK(token_mask->scalar_type() == at::kBool && token_mask->sizes() == leading,
              "MoE: token_mask must be bool of shape ",
              leading,
              ", got ",
              token_mask->scalar_type(),
              " of shape ",
              token_mask->sizes());
  const auto mask = token_mask->reshape(-1);
  // Attention leaves NaN at positions that see nothing; 0 * NaN would carry it into the router's
  // gradient.
  return {tokens.masked_fill(mask.logical_not().unsqueeze(-1), 0), mask};
}

/// The ids with rerouted ones replaced and dropped ones not yet removed.
at::Tensor before_drop(const Routing& routing) {
  return at::where(routing.indices.ge(0), routing.indices, routing.selected);
}

/// Slots per expert: [T, K] -> [E]. Integers, so that any order of adding gives the same.
at::Tensor count(const at::Tensor& indices, int64_t num_experts) {
  const auto slots = indices.flatten();
  const auto of_nobody = at::where(slots.lt(0), num_experts, slots);
  return at::zeros({num_experts + 1}, slots.options())
      .scatter_add_(0, of_nobody, at::ones_like(slots))
      .narrow(0, 0, num_experts);
}

}  // namespace

MoEImpl::MoEImpl(const MoEOptions& settings) : options(settings) {
  check_at_least("MoE", "hidden_size", options.hidden_size(), 1);
  check_at_least("MoE", "num_experts", options.num_experts(), 1);
  check_top_k("MoE", options.top_k(), options.num_experts());
  check_not_negative("MoE", "balance_weight", options.balance_weight());
  check_not_negative("MoE", "z_loss_weight", options.z_loss_weight());
  check_gate(options.gate());
  if (!options.gate().normalize()) {
    // The "topk" weight of a single expert is always 1.
    options.gate().normalize(options.top_k() > 1 ? "topk" : "none");
  }
  if (const auto& capacity = options.capacity()) {
    check_capacity(*capacity, options.num_experts());
    factor_.emplace(capacity->factor(), "Capacity", "factor");
    eval_factor_ = factor_;
    if (capacity->eval_factor()) {
      eval_factor_.emplace(*capacity->eval_factor(), "Capacity", "eval_factor");
    }
    backup_ = at::tensor(capacity->backup(), at::kLong);
  }
  if (!options.router()) {
    options.router(RouterOptions(options.hidden_size(), options.num_experts()));
  }
  check_router(*options.router(), options.hidden_size(), options.num_experts());
  reset();
}

void MoEImpl::reset() {
  router = register_module("router", Router(*options.router()));
  const ExpertsOptions experts_options =
      ExpertsOptions(options.hidden_size(), options.intermediate_size(), options.num_experts())
          .activation(options.activation())
          .bias(options.bias());
  experts = register_module("experts", Experts(experts_options));
}

void MoEImpl::reset_parameters() {
  router->reset_parameters();
  experts->reset_parameters();
}

void MoEImpl::pretty_print(std::ostream& stream) const {
  stream << "torchmoe::nn::MoE(hidden_size=" << options.hidden_size()
         << ", num_experts=" << options.num_experts() << ", top_k=" << options.top_k()
         << ", score_function=" << options.gate().score_function()
         << ", normalize=" << *options.gate().normalize()
         << ", estimator=" << options.gate().estimator();
  if (const auto& capacity = options.capacity()) {
    stream << ", capacity_factor=" << capacity->factor();
    if (capacity->eval_factor()) {
      stream << ", eval_capacity_factor=" << *capacity->eval_factor();
    }
    stream << ", order=" << capacity->order() << ", overflow=" << capacity->overflow();
  }
  stream << ", balance_weight=" << options.balance_weight()
         << ", z_loss_weight=" << options.z_loss_weight() << ")";
}

MoEOutput MoEImpl::forward(const at::Tensor& x, const std::optional<at::Tensor>& token_mask) {
  const auto [tokens, mask] = flatten(x, token_mask, options.hidden_size());  // [T, H], [T]
  // How many tokens count: a tensor, so that nothing is read back; without a mask it is a shape.
  const auto counted = mask ? std::optional<at::Tensor>(mask->sum()) : std::nullopt;
  Routing routing;
  routing.token_mask = mask;

  // 1. Logits: one per token and expert.
  routing.logits = router->forward(tokens);  // [T, E]

  // 2. Decide which experts, and what the full ones drop: integers only.
  routing.selected = select_experts(
      routing.logits.detach(), options.top_k(), std::nullopt, routing.token_mask);  // [T, K]
  routing.indices = limit(routing, counted);                                        // [T, K]

  // 3. Weigh: rerouted slots as what they are now, and before slots are dropped unless asked
  // otherwise.
  const auto& gate = options.gate();
  const bool after_drop =
      options.capacity() &&
      choose<Normalized>("Capacity", options.capacity()->normalize()) == Normalized::after_drop &&
      choose<Normalize>("Gate", *gate.normalize()) != Normalize::none;
  // Weights that are constant have a gradient of zero, which a frozen router does not miss; gate_weights
  // refuses it for one that could learn.
  const bool is_constant =
      gate.estimator() == "exact" &&
      (*gate.normalize() == "uniform" || (*gate.normalize() == "topk" && options.top_k() == 1));
  const auto parameters = router->parameters();
  const bool learns = std::any_of(parameters.begin(), parameters.end(), [](const auto& parameter) {
    return parameter.requires_grad();
  });
  routing.weights = gate_weights(is_constant && !learns ? routing.logits.detach() : routing.logits,
                                 after_drop ? routing.indices : before_drop(routing),
                                 gate.score_function(),
                                 *gate.normalize(),
                                 gate.estimator());  // [T, K]

  // 4. Dispatch and compute.
  const auto y = experts->forward(tokens, routing.indices, routing.weights);  // [T, H]

  // 5. Account: counts and losses.
  routing.tokens_per_expert = count(routing.selected, options.num_experts());  // [E]
  routing.kept_per_expert = options.capacity() ? count(routing.indices, options.num_experts())
                                               : routing.tokens_per_expert;
  routing.losses = losses(routing);
  auto aux_loss = options.balance_weight() * routing.losses.at("load_balancing_loss");
  if (const auto z_loss = routing.losses.find("router_z_loss"); z_loss != routing.losses.end()) {
    aux_loss = aux_loss + options.z_loss_weight() * z_loss->second;
  }
  return {y.reshape(x.sizes()), std::move(aux_loss), std::move(routing)};
}

at::Tensor MoEImpl::limit(const Routing& routing, const std::optional<at::Tensor>& counted) const {
  const auto& selected = routing.selected;
  if (!options.capacity()) {
    return selected;
  }
  const auto& capacity = *options.capacity();
  const auto slots_of = [&](const auto& num_tokens) {
    return expert_capacity(num_tokens,
                           options.num_experts(),
                           options.top_k(),
                           is_training() ? *factor_ : *eval_factor_,
                           capacity.minimum());
  };
  const auto slots = counted
                         ? slots_of(*counted).expand({options.num_experts()})
                         : selected.new_full({options.num_experts()}, slots_of(selected.size(0)));
  const auto overflow = choose<Overflow>("Capacity", capacity.overflow());
  return limit_capacity(
      selected,
      slots,
      capacity.order(),
      std::nullopt,
      capacity.overflow(),
      overflow == Overflow::drop ? std::nullopt : std::optional(routing.logits.detach()),
      overflow == Overflow::backup ? std::optional(backup_.to(selected.device())) : std::nullopt);
}

std::map<std::string, at::Tensor> MoEImpl::losses(const Routing& routing) const {
  const auto& counts = routing.tokens_per_expert;
  // With no counted token the loss is 0 whatever the fraction, as long as that is a number.
  const auto fraction = counts.to(accumulate_dtype(routing.logits.scalar_type())) /
                        counts.sum(-1, /*keepdim=*/true).clamp_min(1);
  std::map<std::string, at::Tensor> losses;
  losses["load_balancing_loss"] = load_balancing_loss(
      routing.logits, fraction, options.gate().score_function(), routing.token_mask);
  if (options.z_loss_weight() > 0) {
    losses["router_z_loss"] = router_z_loss(routing.logits, routing.token_mask);
  }
  return losses;
}

}  // namespace torchmoe::nn
