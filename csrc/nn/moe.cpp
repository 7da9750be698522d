#include "nn/moe.h"

#include <ostream>
#include <typeinfo>
#include <utility>

#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include "common/checks.h"
#include "common/tensors.h"
#include "common/vocabulary.h"
#include "nn/detail/accounting.h"
#include "nn/detail/by_expert.h"
#include "nn/detail/checks.h"
#include "nn/detail/compatibility.h"
#include "nn/detail/decision.h"
#include "nn/detail/update_reminder.h"
#include "nn/selection_bias.h"

namespace torchmoe::nn {
namespace {

void check_options(const MoEOptions& options) {
  options.gate().check();
  if (options.capacity()) {
    options.capacity()->check();
  }
  options.balance().check();
  if (options.assistance()) {
    options.assistance()->check();
  }
  check_at_least("MoE", "hidden_size", options.hidden_size(), 1);
  check_at_least("MoE", "num_experts", options.num_experts(), 1);
  check_top_k("MoE", options.top_k(), options.num_experts());
  check_not_negative("MoE", "routed_scaling_factor", options.routed_scaling_factor());
}

void check_made_for(const char* argument, const char* name, int64_t expected, int64_t actual) {
  TORCH_CHECK_VALUE(
      actual == expected, "MoE: ", argument, " must have ", name, " ", expected, ", got ", actual);
}

std::optional<TokenFunction> shared_experts_of(const MoEOptions& options) {
  const auto& given = options.shared_experts();
  if (given && std::holds_alternative<SharedExpertsOptions>(*given)) {
    return SharedExperts(std::get<SharedExpertsOptions>(*given));
  }
  return given ? std::optional(std::get<TokenFunction>(*given)) : std::nullopt;
}

TokenFunction router_of(const MoEOptions& options) {
  const auto& given = options.router();
  if (given && std::holds_alternative<TokenFunction>(*given)) {
    return std::get<TokenFunction>(*given);
  }
  if (given) {
    return Router(std::get<RouterOptions>(*given));
  }
  const bool reads =
      !usage_readers(options.balance(), options.capacity(), options.assistance().has_value())
           .empty();
  return Router(RouterOptions(options.hidden_size(), options.num_experts()).track_usage(reads));
}

ExpertFunction experts_of(const MoEOptions& options) {
  if (options.experts()) {
    return *options.experts();
  }
  TORCH_CHECK_VALUE(options.intermediate_size(),
                    "MoE: intermediate_size must be given without experts, got None");
  return Experts(
      ExpertsOptions(options.hidden_size(), *options.intermediate_size(), options.num_experts())
          .activation(options.activation())
          .bias(options.bias()));
}

std::shared_ptr<Estimator> estimator_of(const Gate& gate) {
  if (const auto* own = std::get_if<std::shared_ptr<Estimator>>(&gate.estimator())) {
    return *own;
  }
  switch (choose<LayerEstimator>("Gate", std::get<std::string>(gate.estimator()))) {
    case LayerEstimator::exact:
      return std::make_shared<Exact>();
    case LayerEstimator::straight_through:
      return std::make_shared<StraightThrough>();
    case LayerEstimator::straight_through_dense:
      return std::make_shared<StraightThroughDense>();
  }
  TORCH_INTERNAL_ASSERT(false, "an estimator without a class");
}

std::shared_ptr<torch::nn::Module> as_module(const std::shared_ptr<Estimator>& estimator) {
  return std::dynamic_pointer_cast<torch::nn::Module>(estimator);
}

/// x [..., H] and its mask [...] as tokens [T, H], 0 where none counts, and a mask [T].
std::pair<at::Tensor, std::optional<at::Tensor>> flatten(const at::Tensor& x,
                                                         const at::Tensor& token_mask,
                                                         int64_t hidden_size) {
  check_defined("MoE", "x", x);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == hidden_size,
              "MoE: x must be [..., hidden_size] = [..., ",
              hidden_size,
              "], got shape ",
              x.sizes());
  const auto tokens = x.reshape({-1, hidden_size});
  if (!token_mask.defined()) {
    return {tokens, std::nullopt};
  }
  check_token_mask(token_mask, x);
  const auto mask = token_mask.reshape(-1);
  // Attention leaves NaN at positions that see nothing; 0 * NaN would carry it into the router's
  // gradient.
  return {tokens.masked_fill(mask.logical_not().unsqueeze(-1), 0), mask};
}

/// The logits of each token, float32 or wider.
RouterOutput route(const TokenFunction& router, const at::Tensor& tokens, int64_t num_experts) {
  // A class derived from it may override forward alone.
  auto* own = router.exactly<RouterImpl>();
  auto routed = own != nullptr ? own->score(tokens) : RouterOutput{router(tokens)};
  check_output("router",
               routed.logits,
               {tokens.size(0), num_experts},
               "[num_tokens, num_experts]",
               tokens.device());
  routed.logits = wide(routed.logits);
  return routed;
}

void check_like_tokens(const char* part, const at::Tensor& output, const at::Tensor& tokens) {
  check_output(part, output, tokens.sizes(), "[num_tokens, hidden_size]", tokens.device());
}

}  // namespace

MoEImpl::MoEImpl(const MoEOptions& options) : options_(options) {
  check_options(options);
  router_ = router_of(options);
  experts_ = experts_of(options);
  shared_experts_ = shared_experts_of(options);
  const int64_t num_experts = options.num_experts();
  if (const auto* own = router_->as<RouterImpl>()) {
    check_made_for("router", "num_experts", num_experts, own->options().num_experts());
    check_made_for("router", "hidden_size", options.hidden_size(), own->options().hidden_size());
  }
  if (const auto* own = experts_->as<ExpertsImpl>()) {
    check_made_for("experts", "num_experts", num_experts, own->options().num_experts());
    check_made_for("experts", "hidden_size", options.hidden_size(), own->options().hidden_size());
  }
  if (options.assistance()) {
    check_made_for("assistance",
                   "num_experts",
                   num_experts,
                   static_cast<int64_t>(options.assistance()->backup().size()));
  }
  const auto& gate = options.gate();
  estimator_ = estimator_of(gate);
  estimator_->bind({.top_k = options.top_k(),
                    .num_experts = num_experts,
                    .hidden_size = options.hidden_size(),
                    .score_function = gate.score_function(),
                    .normalize = gate.normalize(),
                    .num_groups = gate.num_groups(),
                    .top_groups = gate.top_groups()});
  reminder_ = std::make_shared<UpdateReminder>();
  reset();
  const auto usage = usage_of(*router_);
  TORCH_CHECK_VALUE(!usage.defined() || usage.sizes() == at::IntArrayRef(num_experts),
                    "MoE: router must have usage of shape [",
                    num_experts,
                    "], got ",
                    usage.sizes());
  take(options.balance(), options.capacity());
}

void MoEImpl::reset() {
  TORCH_CHECK(children().empty(),
              "MoE: reset must be called by the layer's constructor or clone(), which has no parts "
              "yet, got a layer; reset_parameters() draws parameters anew");
  if (std::exchange(has_parts_, true)) {
    router_ = router_->clone();
    experts_ = experts_->clone();
    if (shared_experts_) {
      shared_experts_ = shared_experts_->clone();
    }
    if (const auto module = as_module(estimator_)) {
      estimator_ = std::dynamic_pointer_cast<Estimator>(module->clone());
    }
  }
  hold_own_parts();
  // In the order of the Python layer, in which parameters are listed and saved.
  const auto add = [&](const std::string& name, const std::shared_ptr<torch::nn::Module>& module) {
    if (module) {
      register_module(name, module);
    }
  };
  add("router", router_->module());
  add("estimator", as_module(estimator_));
  if (options_.assistance()) {
    assistance = register_module(
        "assistance",
        AssistanceState(AssistanceStateImpl(*options_.assistance(), least_experts(*estimator_))));
  }
  add("experts", experts_->module());
  if (shared_experts_) {
    add("shared_experts", shared_experts_->module());
  }
  // A copy has the bias of the layer that it was made with, whatever rate it has now.
  if (options_.balance().selection_bias_rate() > 0 || selection_bias.defined()) {
    selection_bias = register_wide_buffer("selection_bias", at::zeros({options_.num_experts()}));
  }
}

void MoEImpl::hold_own_parts() {
  if (options_.router() && std::holds_alternative<TokenFunction>(*options_.router())) {
    options_.router(*router_);
  }
  if (options_.experts()) {
    options_.experts(experts_);
  }
  const auto& shared = options_.shared_experts();
  if (shared && std::holds_alternative<TokenFunction>(*shared)) {
    options_.shared_experts(*shared_experts_);
  }
  if (std::holds_alternative<std::shared_ptr<Estimator>>(options_.gate().estimator())) {
    options_.gate().estimator(estimator_);
  }
}

void MoEImpl::take(const Balance& balance, const std::optional<Capacity>& capacity) {
  check_pairs(*this, balance, capacity);
  options_.balance(balance).capacity(capacity);
  backup_ = at::Tensor();
  if (capacity && !capacity->backup().empty()) {
    const auto parameters = this->parameters();
    const auto device = parameters.empty() ? at::Device(at::kCPU) : parameters[0].device();
    backup_ = at::tensor(capacity->backup(), at::kLong).to(device);
  }
  update_reader_ = update_reader(*this);
}

void MoEImpl::set_balance(const Balance& balance) {
  balance.check();
  take(balance, options_.capacity());
}

void MoEImpl::set_capacity(const std::optional<Capacity>& capacity) {
  if (capacity) {
    capacity->check();
  }
  take(options_.balance(), capacity);
}

void MoEImpl::set_routed_scaling_factor(double factor) {
  check_not_negative("MoE", "routed_scaling_factor", factor);
  options_.routed_scaling_factor(factor);
}

void MoEImpl::follow(at::Device device) {
  if (backup_.defined()) {
    backup_ = backup_.to(device);
  }
}

void MoEImpl::reset_parameters() {
  const torch::NoGradGuard no_grad;
  if (auto* own = router_->as<RouterImpl>()) {
    own->reset_parameters();
  }
  if (!assistance.is_empty()) {
    assistance->reset_parameters();
  }
  if (auto* own = experts_->as<ExpertsImpl>()) {
    own->reset_parameters();
  }
  if (shared_experts_) {
    if (auto* own = shared_experts_->as<SharedExpertsImpl>()) {
      own->reset_parameters();
    }
  }
  if (selection_bias.defined()) {
    selection_bias.zero_();
  }
}

void MoEImpl::pretty_print(std::ostream& stream) const {
  stream << "torchmoe::nn::MoE(hidden_size=" << options_.hidden_size()
         << ", num_experts=" << options_.num_experts() << ", top_k=" << options_.top_k()
         << ", score_function=" << estimator_->score_function()
         << ", normalize=" << estimator_->normalize()
         << ", estimator=" << class_name(typeid(*estimator_));
  if (estimator_->num_groups() > 1) {
    stream << ", num_groups=" << estimator_->num_groups()
           << ", top_groups=" << estimator_->top_groups();
  }
  if (const auto& capacity = options_.capacity()) {
    stream << ", capacity=" << *capacity;
  }
  stream << ", balance=" << options_.balance();
  if (options_.routed_scaling_factor() != 1) {
    stream << ", routed_scaling_factor=" << shown(options_.routed_scaling_factor());
  }
  stream << ")";
}

MoEOutput MoEImpl::forward(const at::Tensor& x,
                           const at::Tensor& token_mask,
                           const at::Tensor& earlier_counts) {
  const auto [tokens, mask] = flatten(x, token_mask, options_.hidden_size());  // [T, H], [T]
  // How many tokens count: a tensor, so that nothing is read back; without a mask it is a shape.
  const auto counted = mask ? std::optional(mask->sum()) : std::nullopt;
  if (is_training() && at::GradMode::is_enabled()) {
    reminder_->count(update_reader_);
  }

  // 1. Logits: one per token and expert.
  const auto routed = route(*router_, tokens, options_.num_experts());
  const auto& logits = routed.logits;  // [T, E]

  // 2. Decide which experts, who assists them, and what becomes of the slots that find them full:
  // integers only.
  const auto backup = backup_.defined() ? backup_.to(logits.device()) : backup_;
  const auto choice = decide(*this, logits, mask, counted, backup);

  // 3. Weigh: from the unbiased logits.
  const auto weights =
      choice.weights ? *choice.weights : weigh(*this, logits, choice.weighed);  // [T, K']

  // 4. Dispatch and compute.
  auto y = estimator_->combine(tokens, logits, choice.indices, weights, *experts_, mask);  // [T, H]
  check_like_tokens("gate.estimator.combine", y, tokens);
  if (options_.routed_scaling_factor() != 1) {
    y = options_.routed_scaling_factor() * y;
  }
  if (shared_experts_) {
    auto shared = (*shared_experts_)(tokens);
    check_like_tokens("shared_experts", shared, tokens);
    if (mask) {
      shared = shared.masked_fill(mask->logical_not().unsqueeze(-1), 0);
    }
    y = y + shared.to(y.scalar_type());
  }

  // 5. Account: counts, the losses, and the intermediate results for inspection.
  auto accounted = account(*this,
                           routed,
                           choice,
                           weights,
                           mask,
                           counted,
                           x.sizes().slice(0, x.dim() - 1),
                           if_defined(earlier_counts));
  return {y.reshape(x.sizes()),
          accounted.aux_loss,
          {.logits = logits,
           .weights = weights,
           .selected = choice.selected,
           .indices = choice.indices,
           .token_mask = mask,
           .tokens_per_expert = accounted.tokens_per_expert,
           .kept_per_expert = accounted.kept_per_expert,
           .losses = std::move(accounted.losses)}};
}

void MoEImpl::update(const Routing& routing) {
  update(at::ArrayRef<Routing>(routing));
}

void MoEImpl::update(at::ArrayRef<Routing> routings) {
  TORCH_CHECK_VALUE(!routings.empty(),
                    "MoE: routing must hold at least one Routing, got an empty list");
  for (const auto& routing : routings) {
    TORCH_CHECK_TYPE(routing.tokens_per_expert.defined(),
                     "MoE: routing must be what forward returned, got an empty Routing");
  }
  const torch::NoGradGuard no_grad;
  reminder_->stop();
  auto* tracking = router_->as<UsageTracking>();
  const bool keeps_usage = tracking != nullptr && tracking->usage.defined();
  const auto& balance = options_.balance();
  const double rate = balance.selection_bias_rate();
  if (!keeps_usage && rate == 0) {
    return;
  }
  auto counts = routings[0].tokens_per_expert;
  for (const auto& routing : routings.slice(1)) {
    counts = counts + routing.tokens_per_expert;
  }
  counts = over_processes(*this, counts);
  if (keeps_usage) {
    tracking->update(counts, counts.sum());
    if (!assistance.is_empty()) {
      assistance->update(tracking->usage, counts.sum());
    }
  }
  if (rate > 0) {
    selection_bias.copy_(
        update_selection_bias(selection_bias, counts, rate, balance.selection_bias_centred()));
  }
}

}  // namespace torchmoe::nn
