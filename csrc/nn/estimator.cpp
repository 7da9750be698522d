#include "nn/estimator.h"

#include <algorithm>
#include <sstream>
#include <typeinfo>
#include <utility>

#include <ATen/ops/arange.h>

#include "common/vocabulary.h"
#include "nn/detail/checks.h"
#include "nn/detail/dense_gradient.h"
#include "nn/detail/groups.h"
#include "nn/experts.h"
#include "ops/gate_weights.h"
#include "ops/select_experts.h"

namespace torchmoe::nn {
namespace {

void check_defined_for(const Estimator& estimator,
                       const char* argument,
                       const std::string& value,
                       const std::vector<std::string>& choices) {
  if (choices.empty() || std::find(choices.begin(), choices.end(), value) != choices.end()) {
    return;
  }
  std::ostringstream listed;
  const char* separator = "\"";
  for (const auto& choice : choices) {
    listed << separator << choice << '"';
    separator = " or \"";
  }
  TORCH_CHECK_VALUE(false,
                    "MoE: gate.",
                    argument,
                    " must be ",
                    listed.str(),
                    " for the estimator ",
                    class_name(typeid(estimator)),
                    ", ",
                    estimator.traits().refusal,
                    ", got \"",
                    value,
                    "\"");
}

/// The experts' output, which must be like x.
at::Tensor call_experts(const ExpertFunction& experts,
                        const at::Tensor& x,
                        const at::Tensor& indices,
                        const at::Tensor& weights) {
  auto y = experts(x, indices, weights);
  check_output("experts", y, x.sizes(), "[num_tokens, hidden_size]", x.device());
  return y;
}

}  // namespace

void Estimator::bind(const EstimatorBinding& layer) {
  TORCH_CHECK_VALUE(!layer_ || *layer_ == layer,
                    "MoE: gate.estimator must be an instance of its own for a layer of another "
                    "kind, got one bound to another");
  for (const auto& [argument, value] : {std::pair{"num_experts", layer.num_experts},
                                        {"top_k", layer.top_k},
                                        {"gate.num_groups", layer.num_groups},
                                        {"gate.top_groups", layer.top_groups}}) {
    check_at_least("MoE", argument, value, 1);
  }
  const auto told = traits();
  check_defined_for(*this, "score_function", layer.score_function, told.score_functions);
  if (layer.normalize) {
    check_defined_for(*this, "normalize", *layer.normalize, told.normalizes);
  }
  TORCH_CHECK_VALUE(layer.num_groups == 1 || told.takes_groups,
                    "MoE: gate.num_groups must be 1 for the estimator ",
                    class_name(typeid(*this)),
                    ", ",
                    told.refusal,
                    ", got ",
                    layer.num_groups);
  TORCH_CHECK_VALUE(layer.num_experts % layer.num_groups == 0,
                    "MoE: gate.num_groups must divide num_experts ",
                    layer.num_experts,
                    ", got ",
                    layer.num_groups);
  const int64_t offered = layer.top_groups * layer.num_experts / layer.num_groups;
  TORCH_CHECK_VALUE(layer.top_k <= offered,
                    "MoE: top_k must be in [1, ",
                    offered,
                    "], the experts of gate.top_groups ",
                    layer.top_groups,
                    ", got ",
                    layer.top_k);
  layer_ = layer;
  const auto& known = told.normalizes;
  const bool takes_topk =
      known.empty() || std::find(known.begin(), known.end(), "topk") != known.end();
  normalize_ = layer.normalize.value_or(layer.top_k > 1 && takes_topk ? "topk" : "none");
}

const EstimatorBinding& Estimator::layer() const {
  TORCH_CHECK(layer_, "Estimator: the layer must be told by bind, got none");
  return *layer_;
}

const std::string& Estimator::normalize() const {
  layer();
  return normalize_;
}

at::Tensor Estimator::select(const at::Tensor& logits,
                             const std::optional<at::Tensor>& selection_bias,
                             const std::optional<at::Tensor>& token_mask) {
  return select_experts(rank(logits, selection_bias),
                        top_k(),
                        std::nullopt,
                        token_mask,
                        tie_break(logits, selection_bias));
}

at::Tensor Estimator::weigh(const at::Tensor& logits, const at::Tensor& indices) {
  return gate_weights(logits, indices, score_function(), normalize(), traits().gate_estimator);
}

at::Tensor Estimator::combine(const at::Tensor& x,
                              const at::Tensor& /*logits*/,
                              const at::Tensor& indices,
                              const at::Tensor& weights,
                              const ExpertFunction& experts,
                              const std::optional<at::Tensor>& /*token_mask*/) {
  return call_experts(experts, x, indices, weights);
}

bool Estimator::has_constant_weights(int64_t columns) const {
  const auto chosen = choose<Normalize>("Gate", normalize());
  const bool is_alone = columns == 1 && chosen == Normalize::topk;
  return traits().gate_estimator == "exact" && (is_alone || chosen == Normalize::uniform);
}

at::Tensor Estimator::rank(const at::Tensor& logits,
                           const std::optional<at::Tensor>& selection_bias) const {
  const auto ties = tie_break(logits, selection_bias);
  if (!ties) {
    return logits.detach();
  }
  auto scores = probs(*ties);
  if (selection_bias) {
    scores = scores + selection_bias->to(scores.scalar_type());
  }
  if (layer().num_groups > 1) {
    scores = limit_to_groups(scores, *ties, layer().num_groups, layer().top_groups);
  }
  return scores;
}

std::optional<at::Tensor> Estimator::tie_break(
    const at::Tensor& logits, const std::optional<at::Tensor>& selection_bias) const {
  if (!selection_bias && layer().num_groups == 1) {
    return std::nullopt;
  }
  return logits.detach();
}

at::Tensor Estimator::probs(const at::Tensor& logits,
                            const std::optional<at::Tensor>& token_mask) const {
  auto ids = at::arange(num_experts(), logits.options().dtype(at::kLong)).expand(logits.sizes());
  if (token_mask) {
    ids = ids.masked_fill(token_mask->logical_not().unsqueeze(1), -1);
  }
  return gate_weights(logits, ids, score_function(), "none", "exact");
}

EstimatorTraits StraightThrough::traits() const {
  return {.gate_estimator = "straight_through"};
}

at::Tensor StraightThroughDense::combine(const at::Tensor& x,
                                         const at::Tensor& logits,
                                         const at::Tensor& indices,
                                         const at::Tensor& weights,
                                         const ExpertFunction& experts,
                                         const std::optional<at::Tensor>& token_mask) {
  return attach_dense_gradient_of(
      experts, call_experts(experts, x, indices, weights.detach()), probs(logits, token_mask), x);
}

}  // namespace torchmoe::nn
