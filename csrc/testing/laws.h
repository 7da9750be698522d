// The laws that a certificate tests: L is the weighted sum of a layer's outputs, y [T, H] and
// its losses, with weights that differ from entry to entry.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "subject.h"
#include "tensors.h"

namespace torchmoe::testing::detail {

// A law by name. `holds` throws a Fault if it does not hold; `not_asked` gives the reason why a
// layer is not tested, if there is one.
struct Law {
  std::string name, formula, usually;
  void (*holds)(const Subject&, const at::Tensor& x);
  std::optional<std::string> (*not_asked)(const Layer&);
};

inline std::optional<std::string> always_asked(const Layer& /*layer*/) {
  return std::nullopt;
}

inline void check_selection(const Subject& subject,
                            const at::Tensor& x,
                            const at::Tensor& selected,
                            const std::string& moved) {
  const auto now = subject.selection(x);
  if (!same_bits(now, selected)) {
    fault("the selection must not change within eps, got another one when ",
          moved,
          " moved; take tokens that are away from ties");
  }
}

// (L(v + eps e_i) - L(v - eps e_i)) / (2 eps) for every entry i of every variable v, of a declared
// surrogate where there is one.
inline Gradients differences(const Subject& subject, const at::Tensor& x, const Tensors& weights) {
  at::NoGradGuard no_grad;
  const auto selected = subject.selection(x);
  const auto own = x.detach().clone();
  const auto function = subject.differentiated(x);
  Gradients differences;
  const auto variables = subject.variables(own);
  for (size_t v = 0; v < variables.size(); ++v) {
    const Restored restored(variables[v]);
    const auto difference = at::zeros_like(variables[v]);
    for (int64_t i = 0; i < difference.numel(); ++i) {
      const auto entry = entry_at(variables[v], i);
      const double before = entry.item<double>();
      std::array<double, 2> values{}, places{};
      for (size_t side = 0; side < 2; ++side) {
        entry.fill_(before + (side == 0 ? subject.eps() : -subject.eps()));
        places[side] = entry.item<double>();
        values[side] = Subject::weighted_sum(function(own), weights);
        check_selection(subject, own, selected, subject.name(v));
      }
      entry.fill_(before);
      entry_at(difference, i).fill_((values[0] - values[1]) / (places[0] - places[1]));
    }
    differences.push_back(difference);
  }
  return differences;
}

inline void gradients_are_derivatives(const Subject& subject, const at::Tensor& x) {
  const auto weights = Subject::weights_of(subject.outputs(x.detach()));
  const auto expected = differences(subject, x, weights);  // moves what a graph would have saved
  const auto leaf = Subject::leaf_of(x);
  const auto outputs = subject.outputs(leaf);
  // Another pass, which must not affect the first one's backward.
  const auto other = Subject::leaf_of(x * 0.5);
  const auto others = subject.outputs(other);
  subject.expect_close(subject.gradients(outputs, leaf, weights), expected, "");
  const auto halved = subject.gradients(others, other, weights);
  subject.expect_close(
      halved, subject.gradients(x * 0.5), ", with another forward pass before its backward pass");

  auto transposed = weights;
  transposed[0] = weights[0].t().contiguous().t();
  subject.expect_close(subject.gradients(outputs, leaf, transposed),
                       expected,
                       ", for a transposed incoming gradient");

  const auto without = x.detach().clone();
  auto of_parameters = subject.gradients(subject.outputs(without), without, weights);
  of_parameters[0] = expected[0];
  subject.expect_close(of_parameters, expected, ", where x wants none");
}

inline void uncounted_tokens_have_no_part(const Subject& subject, const at::Tensor& x) {
  const int64_t num_tokens = x.size(0);
  const auto counts = at::arange(num_tokens, at::kLong).remainder(3).ne(1);
  const auto counted = counts.nonzero().squeeze(1);
  const auto uncounted = counts.logical_not().nonzero().squeeze(1);
  const auto rows = uncounted.numel();
  const auto zeros = at::zeros({rows, x.size(1)}, x.options());
  const auto leaf = Subject::leaf_of(x);
  auto outputs = subject.outputs(leaf, counts);
  const auto weights = Subject::weights_of(outputs);
  const auto gradients = subject.gradients(outputs, leaf, weights);
  subject.expect_close(
      outputs[0].detach().index_select(0, uncounted), zeros, "y of tokens that do not count");
  if (!same_bits(gradients[0].index_select(0, uncounted), zeros)) {
    fault("the gradient of x must be exactly 0 for tokens that do not count, got ",
          gradients[0].index_select(0, uncounted).abs().max().item<double>());
  }
  // Their values must not matter, NaN included.
  const auto poisoned = Subject::leaf_of(x.index_fill(0, uncounted, NAN));
  const auto again = subject.outputs(poisoned, counts);
  for (size_t o = 0; o < again.size(); ++o) {
    subject.expect_close(again[o].detach(),
                         outputs[o].detach(),
                         (o == 0 ? "y" : "loss " + std::to_string(o)) +
                             std::string(" with NaN in tokens that do not count"));
  }
  subject.expect_close(subject.gradients(again, poisoned, weights),
                       gradients,
                       " with NaN in tokens that do not count");
  if (subject.layer().decides_per_token) {
    const auto alone = subject.y(x.index_select(0, counted));
    subject.expect_close(outputs[0].detach().index_select(0, counted), alone, "y of the others");
  }
}

inline void gradients_add_up(const Subject& subject, const at::Tensor& x) {
  const auto leaf = Subject::leaf_of(x);
  const auto outputs = subject.outputs(leaf);
  auto weights = Subject::weights_of(outputs);
  auto scaled = weights;
  for (auto& weight : scaled) {
    weight = weight * 3.0;
  }
  auto thrice = subject.gradients(outputs, leaf, weights);
  for (auto& gradient : thrice) {
    gradient = gradient * 3.0;
  }
  subject.expect_close(
      subject.gradients(outputs, leaf, scaled), thrice, ", for three times the objective,");

  if (!subject.layer().decides_per_token) {
    return;
  }
  // Of y alone: a loss of a whole batch is not the sum of its micro-batches' losses.
  for (size_t o = 1; o < weights.size(); ++o) {
    weights[o] = at::Tensor();
  }
  const auto whole = subject.gradients(outputs, leaf, weights);
  Gradients sum;
  for (const auto& gradient : whole) {
    sum.push_back(at::zeros_like(gradient));
  }
  for (int64_t begin = 0; begin < x.size(0); begin += 2) {
    const auto size = std::min<int64_t>(2, x.size(0) - begin);
    const auto part = Subject::leaf_of(x.narrow(0, begin, size));
    auto of_part = weights;
    of_part[0] = weights[0].narrow(0, begin, size);
    const auto gradients = subject.gradients(subject.outputs(part), part, of_part);
    sum[0].narrow(0, begin, size).add_(gradients[0]);
    for (size_t v = 1; v < sum.size(); ++v) {
      sum[v].add_(gradients[v]);
    }
  }
  subject.expect_close(sum, whole, ", summed over micro-batches of two tokens,");
}

inline void tokens_are_exchangeable(const Subject& subject, const at::Tensor& x) {
  const auto y = subject.y(x);
  const auto reversed = x.flip(0);
  subject.expect_close(subject.y(reversed), y.flip(0), "y of the tokens in reverse order");
  const auto twice = subject.y(at::cat({x, x}));
  subject.expect_close(twice, at::cat({y, y}), "y of the tokens, each there twice,");
  for (int64_t t = 0; t < x.size(0); ++t) {
    subject.expect_close(subject.y(x.narrow(0, t, 1)),
                         y.narrow(0, t, 1),
                         "y of token " + std::to_string(t) + " alone");
  }
}

inline std::optional<std::string> unless_per_token(const Layer& layer) {
  return layer.decides_per_token ? std::nullopt
                                 : std::optional<std::string>("a token's experts depend on others");
}

inline void experts_are_exchangeable(const Subject& subject, const at::Tensor& x) {
  const auto y = subject.y(x);
  std::vector<std::unique_ptr<Restored>> restored;
  at::NoGradGuard no_grad;
  for (const auto& name : subject.layer().by_expert) {
    const auto parameter = subject.parameter(name).detach();
    restored.push_back(std::make_unique<Restored>(parameter));
    parameter.copy_(parameter.flip(0));
  }
  subject.expect_close(subject.y(x), y, "y with the experts in reverse order");
}

inline std::optional<std::string> unless_by_expert(const Layer& layer) {
  return layer.by_expert.empty() ? std::optional<std::string>("by_expert names no parameter")
                                 : std::nullopt;
}

inline std::optional<std::string> unless_mask(const Layer& layer) {
  return layer.takes_mask ? std::nullopt : std::optional<std::string>("it takes no token_mask");
}

// d/d variables of <gradients, direction>, against the difference of the gradients along it.
inline void second_derivatives_are_right_or_refused(const Subject& subject, const at::Tensor& x) {
  const auto leaf = Subject::leaf_of(x);
  Tensors directions;
  Gradients found;
  const auto outputs = subject.outputs(leaf);
  try {
    const auto gradients =
        subject.gradients(outputs, leaf, Subject::weights_of(outputs), /*create_graph=*/true);
    at::Tensor along = at::zeros({}, x.options());
    for (const auto& gradient : gradients) {
      directions.push_back(cotangent_of(gradient.detach()));
      along = along + (gradient * directions.back()).sum();
    }
    if (along.requires_grad()) {
      found = subject.gradients({along}, leaf, {at::ones_like(along)});
    } else {
      for (const auto& gradient : gradients) {
        found.push_back(at::zeros_like(gradient).detach());
      }
    }
  } catch (const std::exception&) {
    return;  // refused
  }
  const auto selected = subject.selection(x);
  std::array<Gradients, 2> sides;
  // Everything moves together: without the norm, more elements would move farther.
  double squares = 1;
  for (const auto& direction : directions) {
    squares += direction.square().sum().item<double>();
  }
  const double step = std::sqrt(subject.eps() * 1e-2 / squares);
  for (size_t side = 0; side < 2; ++side) {
    const double signed_step = side == 0 ? step : -step;
    std::vector<std::unique_ptr<Restored>> restored;
    const auto own = x.detach().clone();
    const auto variables = subject.variables(own);
    {
      at::NoGradGuard no_grad;
      for (size_t v = 0; v < variables.size(); ++v) {
        restored.push_back(std::make_unique<Restored>(variables[v]));
        variables[v].detach().add_(directions[v], signed_step);
      }
    }
    check_selection(subject, own, selected, "everything");
    sides[side] = subject.gradients(own);
  }
  Gradients expected;
  for (size_t v = 0; v < found.size(); ++v) {
    expected.push_back((sides[0][v] - sides[1][v]) / (2 * step));
  }
  subject.expect_close(found, expected, ", differentiated once more,");
}

// For a declared gradient nothing says what its derivative should be.
inline std::optional<std::string> unless_declared(const Layer& layer) {
  return layer.surrogate ? std::optional<std::string>("its gradient is declared by a surrogate")
                         : std::nullopt;
}

inline const std::vector<Law>& laws() {
  static const std::vector<Law> laws{
      {"gradients",
       "dL/dv = (L(v + eps) - L(v - eps)) / (2 eps) for every number v of x and the parameters",
       "a term of the backward pass is missing or scaled, or a gradient is lost on one path",
       &gradients_are_derivatives,
       &always_asked},
      {"one token",
       "the same for the first token alone, with which most experts are idle",
       "idle experts or a batch of one take a path that is wrong",
       [](const Subject& subject, const at::Tensor& x) {
         gradients_are_derivatives(subject, x.narrow(0, 0, 1));
       },
       &always_asked},
      {"tokens that do not count",
       "y = 0 and dL/dx = 0 where token_mask is false, whatever they hold; the others as if alone",
       "padding is routed, or takes part in a sum through a product with 0",
       &uncounted_tokens_have_no_part,
       &unless_mask},
      {"accumulation",
       "gradients are linear in the objective, and those of micro-batches add up to the batch's",
       "a gradient is normalised by the batch, written over, or does not see its incoming scale",
       &gradients_add_up,
       &always_asked},
      {"tokens",
       "y of reordered, repeated and single tokens is y reordered, repeated and alone",
       "a sort, an offset or a normalisation mixes tokens",
       &tokens_are_exchangeable,
       &unless_per_token},
      {"experts",
       "y does not change when the experts change places together with their router's rows",
       "an offset by expert is wrong, or a parameter by expert is not indexed by the same id",
       &experts_are_exchangeable,
       &unless_by_expert},
      {"second derivatives",
       "d/dv <dL/dv, u> = (dL/dv(v + h u) - dL/dv(v - h u)) / (2 h), or refused by an exception",
       "the backward pass hides part of itself from autograd: refuse double backward, or mend it",
       &second_derivatives_are_right_or_refused,
       &unless_declared},
  };
  return laws;
}

}  // namespace torchmoe::testing::detail
