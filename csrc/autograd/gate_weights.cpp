#include "ops/gate_weights.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/any.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "autograd/composed.h"
#include "autograd/shares.h"
#include "common/dtypes.h"
#include "common/vocabulary.h"

namespace torchmoe {

namespace {

constexpr auto kGateWeights = "gate_weights";

/// The weights by the formula of `normalize`, differentiable any number of times.
at::Tensor normalized(const at::Tensor& logits,
                      const at::Tensor& routed,
                      const at::Tensor& experts,
                      ScoreFunction score_function,
                      Normalize normalize) {
  switch (normalize) {
    case Normalize::none:
      return at::where(routed, at::gather(scores_of(logits, score_function), 1, experts), 0.0);
    case Normalize::topk:
      return shares_of(at::gather(logits, 1, experts), score_function, routed);
    case Normalize::uniform: {
      const auto ones = routed.to(logits.scalar_type());
      return ones / at::sum(ones, 1, /*keepdim=*/true).clamp_min(1);
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor compose_gate_weights(const at::Tensor& logits,
                                const at::Tensor& indices,
                                std::string_view score_function,
                                std::string_view normalize,
                                std::string_view estimator) {
  const auto score = choose<ScoreFunction>(kGateWeights, score_function);
  const auto formula = choose<Normalize>(kGateWeights, normalize);
  const auto routed = at::logical_and(indices >= 0, indices < logits.sym_size(1));
  const auto experts = at::where(routed, indices, 0);
  // What the logits of a token without a slot hold does not matter, NaN included.
  const auto wide = logits.to(accumulate_dtype(logits.scalar_type()));
  const auto counted = at::where(at::any(routed, 1, /*keepdim=*/true), wide, 0.0);
  switch (choose<GateEstimator>(kGateWeights, estimator)) {
    case GateEstimator::exact:
      return normalized(counted, routed, experts, score, formula);
    case GateEstimator::straight_through: {
      const auto value = normalized(counted.detach(), routed, experts, score, formula);
      const auto through = normalized(counted, routed, experts, score, Normalize::none);
      return value + (through - through.detach());
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

/// Weights that do not depend on the logits would leave the router untrained without a word.
void refuse_zero_gradient(const at::Tensor& logits,
                          const at::Tensor& indices,
                          std::string_view normalize,
                          std::string_view estimator) {
  const bool differentiates = wants_gradient(logits) || has_tangent(logits);
  if (!differentiates || choose<GateEstimator>(kGateWeights, estimator) != GateEstimator::exact) {
    return;
  }
  const auto chosen = choose<Normalize>(kGateWeights, normalize);
  const bool single = chosen == Normalize::topk && indices.dim() == 2 && indices.sym_size(1) == 1;
  TORCH_CHECK_VALUE(chosen != Normalize::uniform && !single,
                    kGateWeights,
                    ": estimator must be \"straight_through\", or normalize \"none\", for the "
                    "router to learn, got estimator \"exact\" with normalize \"",
                    normalize,
                    "\"",
                    single ? " and top_k 1" : "",
                    ", whose gradient is zero everywhere");
}

struct GateWeights {
  static constexpr auto kName = kGateWeights;
  static constexpr auto out = &gate_weights;
  static constexpr auto gradient = &gate_weights_backward;
  static constexpr auto check_gradient = &check_gate_weights_backward;
  static constexpr auto composition = &compose_gate_weights;

  static void check(const at::Tensor& logits,
                    const at::Tensor& indices,
                    std::string_view score_function,
                    std::string_view normalize,
                    std::string_view estimator) {
    check_gate_weights(logits, indices, score_function, normalize, estimator);
    refuse_zero_gradient(logits, indices, normalize, estimator);
  }
};

using GateWeightsDerivatives =
    Composed<GateWeights, const at::Tensor&, std::string_view, std::string_view, std::string_view>;

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("gate_weights", &GateWeightsDerivatives::out);
  m.impl("_gate_weights_backward", &GateWeightsDerivatives::gradient);
}

}  // namespace torchmoe
