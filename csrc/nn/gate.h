// How experts are ranked, and how their weights are formed and differentiated.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>

#include <torch/arg.h>

namespace torchmoe::nn {

class Estimator;

/// A gradient estimator: "exact", "straight_through", "straight_through_dense", or a custom one.
using EstimatorChoice = std::variant<std::string, std::shared_ptr<Estimator>>;

/// The gate rule of a layer; the formulas are those of `gate_weights`. The layer checks the
/// settings (c10::ValueError).
struct Gate {
  /// "softmax" or "sigmoid".
  TORCH_ARG(std::string, score_function) = "softmax";
  /// "none", "topk" or "uniform"; nullopt is "topk" for top_k > 1 and "none" for top_k = 1, whose
  /// "topk" weight is always 1.
  TORCH_ARG(std::optional<std::string>, normalize) = std::nullopt;
  /// A name or a custom estimator; give each layer its own instance.
  TORCH_ARG(EstimatorChoice, estimator) = "exact";
  /// Divides the experts into this many groups of neighbours. Above 1 a token's experts come from
  /// its `top_groups` best groups only, where a group's score is the sum of its two best experts'
  /// score_function(logits) + selection bias (DeepSeek-V3, arXiv 2412.19437).
  TORCH_ARG(int64_t, num_groups) = 1;
  /// How many groups a token chooses from.
  TORCH_ARG(int64_t, top_groups) = 1;

 public:
  /// Throws unless every setting is valid and they are compatible.
  void check() const;
};

}  // namespace torchmoe::nn
