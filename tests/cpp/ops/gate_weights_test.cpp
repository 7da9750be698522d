#include "ops/gate_weights.h"

#include <cmath>
#include <limits>
#include <string>

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::gate_weights;

namespace {

const std::vector<std::string> kScoreFunctions = {"softmax", "sigmoid"};
const std::vector<std::string> kNormalizations = {"none", "topk", "uniform"};

bool exact_is_zero(const std::string& normalize, const Tensor& indices) {
  return normalize == "uniform" || (normalize == "topk" && indices.size(1) == 1);
}

}  // namespace

TEST_CASE("gate_weights: values", "[gate_weights]") {
  for (const auto& [name, indices] : choices()) {
    for (const auto& score : kScoreFunctions) {
      for (const auto& normalize : kNormalizations) {
        for (const auto dtype : kFloatTypes) {
          INFO(name << " " << score << " " << normalize << " " << dtype);
          const Tensor logits = wave({5, 4}, 0, 3, dtype);
          const Tensor w = gate_weights(logits, indices, score, normalize, "exact");
          CHECK(w.scalar_type() == (dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32));
          const Tensor expected =
              torchmoe::reference::gate_weights(logits, indices, score, normalize);
          CHECK(difference(w, expected, 4) == "");
          CHECK(torch::equal(
              gate_weights(strided(logits), strided(indices), score, normalize, "straight_through"),
              w));
        }
      }
    }
  }
}

TEST_CASE("gate_weights: topk does not underflow, and -inf weighs nothing", "[gate_weights]") {
  const double inf = std::numeric_limits<double>::infinity();
  const Tensor logits =
      torch::tensor({{0., -900., -901.}, {-inf, -inf, -inf}, {-inf, 1., -inf}}, torch::kDouble);
  const Tensor indices = ids({{1, 2}, {0, 2}, {0, 1}});
  const Tensor w = gate_weights(logits, indices, "softmax", "topk", "exact");
  const double p = 1 / (1 + std::exp(-1.0));
  const Tensor expected = torch::tensor({{p, 1 - p}, {0., 0.}, {0., 1.}}, torch::kDouble);
  CHECK(difference(w, expected, 2) == "");
  CHECK(torch::equal(gate_weights(logits, indices, "softmax", "none", "exact")[1],
                     torch::zeros({2}, torch::kDouble)));
  CHECK(torch::equal(
      gate_weights(torch::full({1, 3}, -inf), ids({{0, 2}}), "sigmoid", "topk", "exact"),
      torch::zeros({1, 2})));
}

TEST_CASE("gate_weights: NaN stays with its token's routed slots", "[gate_weights]") {
  Tensor logits = wave({3, 4}, 0, 1, torch::kFloat32);
  logits[1][0] = std::nan("");
  const Tensor indices = ids({{0, 1}, {0, -1}, {2, 3}});
  for (const auto& score : kScoreFunctions) {
    for (const std::string normalize : {"none", "topk"}) {
      const Tensor w = gate_weights(logits, indices, score, normalize, "exact");
      CHECK(w[0].isfinite().all().item<bool>());
      CHECK(w[2].isfinite().all().item<bool>());
      CHECK(std::isnan(w[1][0].item<double>()));
      CHECK(w[1][1].item<double>() == 0);
    }
  }
}

TEST_CASE("gate_weights: empty", "[gate_weights]") {
  const Tensor none = torch::empty({0, 2}, torch::kLong);
  CHECK(gate_weights(torch::empty({0, 4}), none, "softmax", "topk", "exact").sizes() ==
        at::IntArrayRef{0, 2});
}

TEST_CASE("gate_weights: exact gradient", "[gate_weights]") {
  for (const auto& [name, indices] : choices()) {
    for (const auto& score : kScoreFunctions) {
      for (const auto& normalize : kNormalizations) {
        if (exact_is_zero(normalize, indices)) {
          continue;
        }
        INFO(name << " " << score << " " << normalize);
        const auto function = [&, indices = indices](const Tensors& in) {
          return gate_weights(in[0], indices, score, normalize, "exact");
        };
        CHECK(gradcheck(function, {leaf({5, 4}, 0, 3)}).message == "");
      }
    }
  }
}

TEST_CASE("gate_weights: straight_through is its closed form for every normalize",
          "[gate_weights]") {
  for (const auto& [name, indices] : choices()) {
    for (const auto& score : kScoreFunctions) {
      for (const auto& normalize : kNormalizations) {
        INFO(name << " " << score << " " << normalize);
        const Tensor logits = leaf({5, 4}, 0, 3), grad = wave(indices.sizes(), 2);
        gate_weights(logits, indices, score, normalize, "straight_through").backward(grad);
        const Tensor expected =
            torchmoe::reference::straight_through_gradient(grad, logits, indices, score);
        CHECK(difference(logits.grad(), expected, 4) == "");
        // With K = 1 and "topk" too, where the exact gradient vanishes.
        CHECK(logits.grad().any().item<bool>() == indices.ge(0).any().item<bool>());
      }
    }
  }
}

TEST_CASE("gate_weights: straight_through equals exact for none", "[gate_weights]") {
  for (const auto& score : kScoreFunctions) {
    const auto function = [&](const Tensors& in) {
      return gate_weights(in[0], fixture_indices(), score, "none", "straight_through");
    };
    CHECK(gradcheck(function, {fixture_logits().requires_grad_()}).message == "");
  }
}

TEST_CASE("gate_weights: a gradient that is zero everywhere is refused", "[gate_weights]") {
  const Tensor logits = leaf({5, 4}), two = choices()[0].indices, one = two.narrow(1, 0, 1);
  const auto refusal =
      contains(R"(gate_weights: estimator must be "straight_through", or normalize "none",)");
  for (const auto& score : kScoreFunctions) {
    CHECK_THROWS_AS(gate_weights(logits, two, score, "uniform", "exact"), c10::ValueError);
    CHECK_THROWS_WITH(gate_weights(logits, two, score, "uniform", "exact"), refusal);
    CHECK_THROWS_WITH(gate_weights(logits, one, score, "topk", "exact"), refusal);
    CHECK_NOTHROW(gate_weights(logits.detach(), one, score, "topk", "exact"));
    CHECK_NOTHROW(gate_weights(logits, one, score, "none", "exact"));
    at::NoGradGuard no_grad;
    CHECK_NOTHROW(gate_weights(logits, two, score, "uniform", "exact"));
  }
}

TEST_CASE("gate_weights: double backward", "[gate_weights]") {
  for (const auto& score : kScoreFunctions) {
    for (const std::string estimator : {"exact", "straight_through"}) {
      const auto function = [&](const Tensors& in) {
        return gate_weights(in[0], fixture_indices(), score, "topk", estimator);
      };
      CHECK(gradgradcheck(function, {fixture_logits().requires_grad_()}).message == "");
    }
  }
}

TEST_CASE("gate_weights: errors", "[gate_weights]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor logits = torch::zeros({2, 4}), indices = ids({{0, 1}, {2, 3}});
  CHECK_THROWS_WITH(
      gate_weights(logits[0], indices, "softmax", "topk", "exact"),
      contains("gate_weights: logits must be [num_tokens, num_experts], got shape [4]"));
  CHECK_THROWS_WITH(gate_weights(indices, indices, "softmax", "topk", "exact"),
                    contains("gate_weights: logits must be float32"));
  CHECK_THROWS_WITH(
      gate_weights(logits, indices.slice(0, 1), "softmax", "topk", "exact"),
      contains("gate_weights: indices must be [num_tokens, top_k] = [2, 2], got shape [1, 2]"));
  CHECK_THROWS_WITH(gate_weights(logits, logits, "softmax", "topk", "exact"),
                    contains("gate_weights: indices must be") && contains("got"));
  CHECK_THROWS_WITH(gate_weights(logits, indices.to(torch::kInt), "softmax", "topk", "exact"),
                    contains("gate_weights: indices must be Long, got Int"));
  CHECK_THROWS_AS(gate_weights(logits, indices, "tanh", "topk", "exact"), c10::ValueError);
  CHECK_THROWS_WITH(
      gate_weights(logits, indices, "tanh", "topk", "exact"),
      contains(R"(gate_weights: score_function must be one of "softmax", "sigmoid", got "tanh")"));
  CHECK_THROWS_WITH(
      gate_weights(logits, indices, "softmax", "l2", "exact"),
      contains(R"(gate_weights: normalize must be one of "none", "topk", "uniform", got "l2")"));
  CHECK_THROWS_WITH(
      gate_weights(logits, indices, "softmax", "topk", "ste"),
      contains(R"(gate_weights: estimator must be one of "exact", "straight_through", got "ste")"));
}
