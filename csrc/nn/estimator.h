// Gradient estimators: how a layer chooses, weighs and combines, and what its router learns from.
//
// The choice of experts is an integer and has no gradient. An estimator defines what to use
// instead. A layer calls three of its methods, in this order:
//
//   select(logits)                                  -> indices [T, K]  override to sample
//   weigh(logits, indices)                          -> weights [T, K]  override for a gate rule
//   combine(x, logits, indices, weights, experts)   -> y [T, H]        override to use experts that
//                                                                      were not chosen
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "replaceable.h"

namespace torchmoe::nn {

/// What an estimator declares.
struct EstimatorTraits {
  /// The gradient that `weigh` requests from `gate_weights`.
  std::string gate_estimator = "exact";
  /// The score functions and normalisations that it is defined for; empty: all.
  std::vector<std::string> score_functions = {};
  std::vector<std::string> normalizes = {};
  /// Whether its selection respects the gate's groups, and a selection bias.
  bool takes_groups = true;
  bool takes_selection_bias = true;
  /// Whether its selection gives every token that counts top_k experts.
  bool fills_slots = true;
  /// Why it is not defined for the others; ends the requirement in that error message.
  std::string refusal = {};
};

/// What an estimator knows of its layer.
struct EstimatorBinding {
  int64_t top_k;
  int64_t num_experts;
  int64_t hidden_size;
  std::string score_function;
  std::optional<std::string> normalize;  ///< nullopt: the estimator's own choice
  int64_t num_groups = 1;
  int64_t top_groups = 1;

  bool operator==(const EstimatorBinding&) const = default;
};

/// Base class of the gradient estimators; by itself it is the exact derivative of the weights. Your
/// own estimator overrides what differs:
///
///     struct Temperature : torchmoe::nn::Estimator {
///       at::Tensor weigh(const at::Tensor& logits, const at::Tensor& indices) override {
///         return Estimator::weigh(logits / 2.0, indices);
///       }
///     };
///     MoE moe(MoEOptions(64, 128, 8, 2).gate(Gate().estimator(std::make_shared<Temperature>())));
///
/// An estimator with parameters, buffers or a training mode also derives from
/// torch::nn::Cloneable<Own>; the layer then registers it as its submodule `estimator` and clones
/// it. Otherwise copies of a layer share it.
class Estimator {
 public:
  Estimator() = default;
  Estimator(const Estimator&) = default;
  Estimator(Estimator&&) = default;
  Estimator& operator=(const Estimator&) = default;
  Estimator& operator=(Estimator&&) = default;
  virtual ~Estimator() = default;

  virtual EstimatorTraits traits() const { return {}; }

  /// Chooses the experts.
  ///
  /// logits [T, E]; selection_bias [E], see `rank`; token_mask [T] bool, a token where it is false
  /// must get -1 in every slot -> indices [T, K] int64, best first, -1 = not routed. An estimator
  /// that samples draws from torch's default generator.
  virtual at::Tensor select(const at::Tensor& logits,
                            const std::optional<at::Tensor>& selection_bias,
                            const std::optional<at::Tensor>& token_mask);

  /// The combine weight of each slot, differentiable in logits.
  ///
  /// logits [T, E]; indices [T, K] as selected: rerouted ids already replaced, dropped ones not yet
  /// removed (unless Capacity::normalize is "after_drop") -> weights [T, K], from `gate_weights`.
  virtual at::Tensor weigh(const at::Tensor& logits, const at::Tensor& indices);

  /// The layer's output from its experts.
  ///
  /// x [T, H]; logits [T, E]; indices [T, K] as routed, -1 = not routed; weights [T, K]; experts as
  /// in experts(x, indices, weights) -> y [T, H]; token_mask [T] bool -> y [T, H]. A masked token
  /// must get y = 0 and give the router no gradient.
  virtual at::Tensor combine(const at::Tensor& x,
                             const at::Tensor& logits,
                             const at::Tensor& indices,
                             const at::Tensor& weights,
                             const ExpertFunction& experts,
                             const std::optional<at::Tensor>& token_mask);

  /// Whether the weights from `weigh`, and their derivative, do not depend on the logits, for ids
  /// [T, columns].
  virtual bool has_constant_weights(int64_t columns) const;

  /// What the experts are ranked by, here and when a layer reroutes a slot. These are the logits;
  /// with a selection bias or groups of experts they are score_function(logits) plus the bias, and
  /// -inf for experts outside the token's groups. [T, E], without a gradient.
  at::Tensor rank(const at::Tensor& logits, const std::optional<at::Tensor>& selection_bias) const;

  /// What decides between experts whose `rank` is equal, such as scores that have underflowed: the
  /// logits [T, E]; nullopt if the logits themselves rank the experts.
  std::optional<at::Tensor> tie_break(const at::Tensor& logits,
                                      const std::optional<at::Tensor>& selection_bias) const;

  /// score_function(logits) for every expert [T, E], with its exact derivative; 0 and no gradient
  /// where token_mask is false.
  at::Tensor probs(const at::Tensor& logits,
                   const std::optional<at::Tensor>& token_mask = std::nullopt) const;

  /// Tells the estimator about the layer it belongs to; the layer calls it once. Throws
  /// c10::ValueError if a size is out of range, the estimator is not defined for that gate, or it
  /// already belongs to a layer of another kind.
  void bind(const EstimatorBinding& layer);

  int64_t top_k() const { return layer().top_k; }
  int64_t num_experts() const { return layer().num_experts; }
  int64_t hidden_size() const { return layer().hidden_size; }
  int64_t num_groups() const { return layer().num_groups; }
  int64_t top_groups() const { return layer().top_groups; }
  const std::string& score_function() const { return layer().score_function; }
  const std::string& normalize() const;

 private:
  const EstimatorBinding& layer() const;

  std::optional<EstimatorBinding> layer_;
  std::string normalize_;
};

/// The derivative of the weights as they are, at a fixed choice of experts.
class Exact : public Estimator {};

/// Selection and normalisation count as the identity (Bengio et al., arXiv 1308.3432): with g_j =
/// dL/dw_j, dL/dp_i is the sum of g_j over the slots j with i_j = i, 0 for the other experts. The
/// router learns even if the weights are constant: at top_k = 1 with normalize "topk", and with
/// "uniform".
class StraightThrough : public Estimator {
 public:
  EstimatorTraits traits() const override;
};

/// The router learns from every expert, including those that a token did not choose: dL/dp_i =
/// <dL/dy, E_i(x)> for all E experts, selection, capacity and normalisation counting as the
/// identity (DenseMixer, Yao et al., https://openreview.net/forum?id=4HGIIekCx3).
///
/// The forward pass costs nothing extra; the backward pass computes every expert once for every
/// token. With `Experts` one op does this in blocks of 128 tokens (`attach_dense_gradient`); other
/// experts are called once each, in the backward pass.
class StraightThroughDense : public StraightThrough {
 public:
  at::Tensor combine(const at::Tensor& x,
                     const at::Tensor& logits,
                     const at::Tensor& indices,
                     const at::Tensor& weights,
                     const ExpertFunction& experts,
                     const std::optional<at::Tensor>& token_mask) override;
};

}  // namespace torchmoe::nn
