#include "nn/estimator.h"

#include <memory>
#include <optional>
#include <string>

#include "catch2.h"
#include "nn/layers.h"
#include "nn/moe.h"
#include "ops/gate_weights.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Balance;
using torchmoe::nn::Estimator;
using torchmoe::nn::EstimatorTraits;
using torchmoe::nn::ExpertFunction;
using torchmoe::nn::Gate;
using torchmoe::nn::MoE;
using torchmoe::nn::MoEImpl;
using torchmoe::nn::MoEOptions;
using torchmoe::nn::RouterImpl;

namespace {

// An estimator with a parameter of its own.
struct LearnedTemperature : torch::nn::Cloneable<LearnedTemperature>, Estimator {
  LearnedTemperature() { reset(); }
  void reset() override { temperature = register_parameter("temperature", torch::ones({})); }
  Tensor weigh(const Tensor& logits, const Tensor& indices) override {
    return Estimator::weigh(logits / temperature, indices);
  }

  Tensor temperature;
};

// One that is not defined for everything.
struct Narrow : Estimator {
  EstimatorTraits traits() const override {
    return {.score_functions = {"softmax"},
            .normalizes = {"none"},
            .takes_groups = false,
            .takes_selection_bias = false,
            .refusal = "which is narrow"};
  }
};

}  // namespace

TEST_CASE("experts of one's own, with every estimator", "[nn]") {
  for (const std::string estimator : {"exact", "straight_through", "straight_through_dense"}) {
    CAPTURE(estimator);
    Matrices matrices;
    MoE moe(MoEOptions(6, std::nullopt, 4, 2).experts(matrices).gate(Gate().estimator(estimator)));
    const auto output = moe(tokens(7));
    const auto grad = wave({7, 6}, 1, 1, torch::kFloat32);
    torch::autograd::backward({output.hidden_states}, {grad});
    CHECK(matrices->matrices.grad().abs().max().item<double>() > 0);
    if (estimator == "straight_through_dense") {
      // dL/dp_i = <dL/dy, E_i(x)> for every expert.
      const torch::NoGradGuard no_grad;
      const auto of_probs = torch::einsum("to,th,eoh->te", {grad, tokens(7), matrices->matrices});
      const auto p = output.routing.logits.softmax(1);
      const auto of_logits = p * (of_probs - (p * of_probs).sum(1, true));
      const auto expected = of_logits.t().matmul(tokens(7));
      CHECK(torch::allclose(moe->router().as<RouterImpl>()->weight.grad(), expected, 1e-4, 1e-5));
    }
  }
}

TEST_CASE("the dense gradient of any experts is that of the op", "[nn]") {
  MoE stacked(sizes().gate(Gate().estimator("straight_through_dense")));
  // The same experts behind a function, of which the estimator knows nothing.
  const auto experts = stacked->experts();
  MoE called(sizes()
                 .gate(Gate().estimator("straight_through_dense"))
                 .router(stacked->router())
                 .experts(ExpertFunction([=](const Tensor& x, const Tensor& i, const Tensor& w) {
                   return experts(x, i, w);
                 })));
  const auto gradient = [&](MoE& moe) {
    stacked->zero_grad();
    const auto output = moe(tokens(7)).hidden_states;
    output.square().sum().backward();
    return stacked->router().as<RouterImpl>()->weight.grad().clone();
  };
  const auto expected = gradient(stacked);
  CHECK(torch::allclose(gradient(called), expected, 1e-4, 1e-6));
  // And its own derivative, by the router's weight.
  const auto second = [&](MoE& moe) {
    const auto weight = stacked->router().as<RouterImpl>()->weight;
    const auto loss = moe(tokens(7)).hidden_states.square().sum();
    const auto first = torch::autograd::grad({loss}, {weight}, {}, true, /*create_graph=*/true)[0];
    return torch::autograd::grad({first.square().sum()}, {weight})[0];
  };
  const auto of_op = second(stacked);
  CHECK(of_op.abs().max().item<double>() > 0);
  CHECK(torch::allclose(second(called), of_op, 1e-3, 1e-5));
}

TEST_CASE("an estimator with parameters is a part of the layer", "[nn]") {
  const auto estimator = std::make_shared<LearnedTemperature>();
  MoE moe(sizes().gate(Gate().estimator(estimator).normalize("none")));
  CHECK(moe->named_parameters().contains("estimator.temperature"));
  moe(tokens(7)).hidden_states.sum().backward();
  CHECK(estimator->temperature.grad().abs().item<double>() > 0);
  MoE copy(std::dynamic_pointer_cast<MoEImpl>(moe->clone()));
  {
    const torch::NoGradGuard no_grad;
    estimator->temperature.fill_(4);
  }
  CHECK_FALSE(torch::equal(copy(tokens(7)).routing.weights, moe(tokens(7)).routing.weights));
  const auto weights = torchmoe::gate_weights(moe(tokens(7)).routing.logits / 4,
                                              moe(tokens(7)).routing.indices,
                                              "softmax",
                                              "none",
                                              "exact");
  CHECK(torch::equal(moe(tokens(7)).routing.weights, weights));
}

TEST_CASE("an estimator says what it is not defined for", "[nn]") {
  const auto refuses = [](Gate gate, const Balance& balance, const std::string& message) {
    CHECK_THROWS_WITH(
        MoE(sizes().gate(gate.estimator(std::make_shared<Narrow>())).balance(balance)),
        contains(message));
  };
  refuses(Gate().score_function("sigmoid"),
          Balance(),
          "MoE: gate.score_function must be \"softmax\" for the estimator Narrow, which is narrow, "
          "got \"sigmoid\"");
  refuses(Gate().normalize("topk"),
          Balance(),
          "MoE: gate.normalize must be \"none\" for the estimator Narrow, which is narrow, got "
          "\"topk\"");
  refuses(Gate().num_groups(2),
          Balance(),
          "MoE: gate.num_groups must be 1 for the estimator Narrow, which is narrow, got 2");
  refuses(
      Gate(),
      Balance().selection_bias_rate(0.5),
      "MoE: balance.selection_bias_rate must be 0 for the estimator Narrow, which is narrow, got "
      "0.5");
  const auto one = std::make_shared<Narrow>();
  MoE first(sizes().gate(Gate().estimator(one)));
  CHECK(first->estimator().normalize() == "none");
  CHECK_THROWS_WITH(MoE(MoEOptions(6, 5, 4, 1).gate(Gate().estimator(one))),
                    contains("MoE: gate.estimator must be an instance of its own"));
  CHECK_THROWS_WITH(Estimator().bind({.top_k = 2,
                                      .num_experts = 4,
                                      .hidden_size = 6,
                                      .score_function = "softmax",
                                      .normalize = std::nullopt,
                                      .num_groups = 0}),
                    contains("MoE: gate.num_groups must be >= 1, got 0"));
  CHECK_THROWS_WITH(Estimator().top_k(), contains("Estimator: the layer must be told by bind"));
}

TEST_CASE("groups limit where a token's experts come from", "[nn]") {
  for (const std::string score_function : {"softmax", "sigmoid"}) {
    MoE moe(MoEOptions(6, 5, 8, 2)
                .gate(Gate().score_function(score_function).num_groups(4).top_groups(1)));
    const auto routing = moe(wave({40, 6}, 0, 3, torch::kFloat32)).routing;
    const auto group = routing.indices.div(2, "floor");
    CHECK(group.select(1, 0).eq(group.select(1, 1)).all().item<bool>());
    // A group's score is the sum of its two experts'.
    const auto scores =
        score_function == "softmax" ? routing.logits.softmax(1) : routing.logits.sigmoid();
    CHECK(torch::equal(group.select(1, 0), scores.view({40, 4, 2}).sum(2).argmax(1)));
  }
}
