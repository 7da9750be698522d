#include "nn/detail/decision.h"

#include <algorithm>
#include <array>
#include <vector>

#include <ATen/ops/rand.h>
#include <ATen/ops/where.h>

#include "common/tensors.h"
#include "common/vocabulary.h"
#include "nn/detail/checks.h"
#include "nn/detail/compatibility.h"
#include "ops/limit_capacity.h"

namespace torchmoe::nn {
namespace {

at::Tensor select(MoEImpl& layer,
                  const at::Tensor& logits,
                  const std::optional<at::Tensor>& token_mask) {
  auto chosen = layer.estimator().select(logits, if_defined(layer.selection_bias), token_mask);
  TORCH_CHECK_TYPE(chosen.defined(),
                   "MoE: gate.estimator.select must return a tensor, got an undefined one");
  const std::array<int64_t, 2> expected{logits.size(0), layer.options().top_k()};
  TORCH_CHECK(chosen.scalar_type() == at::kLong && chosen.sizes() == at::IntArrayRef(expected),
              "MoE: gate.estimator.select must return int64 [num_tokens, top_k] = ",
              at::IntArrayRef(expected),
              ", got ",
              chosen.scalar_type(),
              " of shape ",
              chosen.sizes());
  TORCH_CHECK(chosen.device() == logits.device(),
              "MoE: gate.estimator.select must return a tensor on ",
              logits.device(),
              ", got one on ",
              chosen.device());
  return chosen;
}

bool router_learns(const MoEImpl& layer) {
  const auto& module = layer.router().module();
  const auto parameters = module ? module->parameters() : std::vector<at::Tensor>();
  return std::any_of(parameters.begin(), parameters.end(), [](const auto& parameter) {
    return parameter.requires_grad();
  });
}

/// What decides who is served first, undefined where the order alone does.
at::Tensor priority_of(MoEImpl& layer,
                       const Capacity& capacity,
                       const at::Tensor& selected,
                       const std::optional<at::Tensor>& weights) {
  if (weights) {
    return weights->detach();
  }
  const bool draws = capacity.priority() && layer.is_training() &&
                     choose<Priority>("Capacity", *capacity.priority()) == Priority::random;
  return draws ? at::rand(selected.sizes(), at::device(selected.device())) : at::Tensor();
}

at::Tensor slots_of(const MoEImpl& layer,
                    const Capacity& capacity,
                    const at::Tensor& selected,
                    const std::optional<at::Tensor>& counted) {
  const auto usage = capacity.dynamic() ? usage_of(layer.router()) : at::Tensor();
  const auto& options = layer.options();
  const auto slots = [&](const auto& num_tokens) {
    return capacity.slots(
        selected, num_tokens, options.num_experts(), options.top_k(), layer.is_training(), usage);
  };
  return counted ? slots(*counted) : slots(selected.size(0));
}

}  // namespace

Choice decide(MoEImpl& layer,
              const at::Tensor& logits,
              const std::optional<at::Tensor>& token_mask,
              const std::optional<at::Tensor>& counted,
              const at::Tensor& backup) {
  const auto chosen = select(layer, logits, token_mask);
  const bool is_assisted = !layer.assistance.is_empty();
  const auto selected = is_assisted ? layer.assistance->forward(chosen) : chosen;
  if (!layer.options().capacity()) {
    return {chosen, selected, selected, selected, std::nullopt, !is_assisted};
  }
  const auto& capacity = *layer.options().capacity();
  auto& estimator = layer.estimator();
  // The layer's own weights where nothing is rerouted: an estimator that draws would give other
  // ones a second time.
  std::optional<at::Tensor> weights;
  if (capacity.priority() &&
      choose<Priority>("Capacity", *capacity.priority()) == Priority::weight) {
    weights = weigh(layer, logits, selected);
  }
  const auto bias = if_defined(layer.selection_bias);
  std::optional<at::Tensor> scores;
  std::optional<at::Tensor> tie_break;
  if (capacity.reroutes()) {
    scores = estimator.rank(logits, bias);
    tie_break = estimator.tie_break(logits, bias);
  }
  const auto indices = limit_capacity(selected,
                                      slots_of(layer, capacity, selected, counted),
                                      capacity.order(),
                                      if_defined(priority_of(layer, capacity, selected, weights)),
                                      capacity.overflow(),
                                      scores,
                                      if_defined(backup),
                                      tie_break);
  const bool renormalizes = capacity.renormalizes(estimator.normalize());
  // Before slots are dropped unless asked otherwise, which concerns the normalisation alone.
  auto weighed = selected;
  if (renormalizes) {
    weighed = indices;
  } else if (capacity.reroutes()) {
    weighed = at::where(indices.ge(0), indices, selected);
  }
  if (capacity.reroutes() || renormalizes) {
    weights.reset();
  }
  return {chosen, selected, indices, weighed, weights, false};
}

at::Tensor weigh(MoEImpl& layer, const at::Tensor& logits, const at::Tensor& ids) {
  auto& estimator = layer.estimator();
  const bool is_given = estimator.has_constant_weights(ids.size(1)) && !router_learns(layer);
  auto weights = estimator.weigh(is_given ? logits.detach() : logits, ids);
  check_output("gate.estimator.weigh", weights, ids.sizes(), "[num_tokens, top_k]", ids.device());
  return weights;
}

}  // namespace torchmoe::nn
