// The layer keeps every law of torchmoe/testing.h.
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "catch2.h"
#include "nn/moe.h"
#include "ops/gate_weights.h"
#include "ops/mean_over_tokens.h"
#include "support.h"
#include "testing.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Balance;
using torchmoe::nn::Capacity;
using torchmoe::nn::Gate;
using torchmoe::nn::MoE;
using torchmoe::nn::MoEOptions;
using torchmoe::nn::RouterImpl;
using torchmoe::nn::RouterOptions;
using torchmoe::nn::SharedExperts;
using torchmoe::testing::Certificate;
using torchmoe::testing::certify;
using torchmoe::testing::Tensors;

namespace {

MoEOptions sizes() {
  return MoEOptions(4, 3, 4, 2).balance(Balance(0.1).z_loss_weight(0.01));
}

using Surrogate = std::function<std::function<Tensors(const Tensor&)>(MoE&, const Tensor&)>;

Certificate certificate_of(MoE& moe,
                           bool decides_per_token = true,
                           const Surrogate& surrogate = nullptr,
                           bool may_exchange = true) {
  moe->to(torch::kFloat64);
  const auto forward = [&](const Tensor& x, const Tensor& mask) -> Tensors {
    const auto out = moe->forward(x, mask);
    return {out.hidden_states, out.aux_loss};
  };
  const auto selection = [&](const Tensor& x) { return moe->forward(x).routing.indices; };
  std::vector<std::string> by_expert;
  for (const auto& parameter : moe->named_parameters()) {
    if (may_exchange && parameter.key().rfind("shared_experts", 0) != 0) {
      by_expert.push_back(parameter.key());
    }
  }
  torchmoe::testing::Layer layer{.forward = forward,
                                 .parameters = moe->named_parameters().pairs(),
                                 .selection = selection,
                                 .by_expert = by_expert,
                                 .decides_per_token = decides_per_token};
  if (surrogate) {
    layer.surrogate = [&](const Tensor& x) { return surrogate(moe, x); };
  }
  return certify(layer, wave({9, 4}, 0.3, 1, torch::kFloat64));
}

Certificate certificate_of(const MoEOptions& options, bool decides_per_token = true) {
  MoE moe(options);
  return certificate_of(moe, decides_per_token);
}

// Without the usage scaling of its gradient, and with the weight's value at some point: logits whose
// derivative by the weight is scaled.
Tensor scaled_logits(const RouterImpl& router, const Tensor& x, const Tensor& weight_then) {
  const auto scale = (1 - router.usage).unsqueeze(-1);
  return x.matmul((weight_then + scale * (router.weight - weight_then)).t());
}

// y with weights that are held, plus the scores' deviation from what they are held at times the held
// outputs of the experts: of those that serve a token, or of all.
Surrogate straight_through(bool dense) {
  return [dense](MoE& moe, const Tensor& at) -> std::function<Tensors(const Tensor&)> {
    const auto then = moe(at).routing;
    const int64_t experts = moe->options().num_experts();
    const auto ids = dense ? torch::arange(experts).expand({at.size(0), experts}) : then.indices;
    std::vector<Tensor> outputs;
    for (int64_t j = 0; j < ids.size(1); ++j) {
      const auto id = ids.narrow(1, j, 1).contiguous();
      outputs.push_back(moe->experts()(at, id, torch::ones_like(id, torch::kFloat64)));
    }
    const auto held = torch::stack(outputs, 1);  // [T, K, H]
    const auto scores = [&moe, ids](const Tensor& x) {
      return torchmoe::gate_weights(moe->router()(x), ids, "softmax", "none", "exact");
    };
    const auto scores_then = scores(at);
    return [=, &moe](const Tensor& x) -> Tensors {
      const auto y = moe->experts()(x, then.indices, then.weights);
      const auto learned = ((scores(x) - scores_then).unsqueeze(-1) * held).sum(1);
      return {y + learned, moe(x).aux_loss};
    };
  };
}

Tensor mean_square(const torchmoe::nn::LossInputs& inputs) {
  return torchmoe::mean_over_tokens(inputs.logits.square(), inputs.token_mask).mean();
}

void holds(const Certificate& certificate, size_t laws) {
  INFO(certificate.to_string());
  CHECK(certificate);
  CHECK(certificate.held.size() == laws);
}

}  // namespace

TEST_CASE("MoE keeps the laws", "[nn]") {
  torch::manual_seed(0);
  holds(certificate_of(sizes()), 7);
  holds(certificate_of(sizes().bias(true).activation("gelu")), 7);
  holds(certificate_of(sizes().gate(Gate().score_function("sigmoid").normalize("none"))), 7);
  holds(certificate_of(sizes().capacity(Capacity(0.75)), /*decides_per_token=*/false), 6);
}

TEST_CASE("MoE keeps the laws with every part", "[nn]") {
  torch::manual_seed(0);
  holds(certificate_of(sizes().shared_experts(SharedExperts(4, 3)).routed_scaling_factor(2.5)), 7);
  holds(certificate_of(sizes().balance(
            Balance(0.1).fraction_from("history").losses({{"mean_square", mean_square, 0.5}}))),
        7);
  holds(certificate_of(sizes().capacity(Capacity(0.75).priority("weight").normalize("after_drop")),
                       /*decides_per_token=*/false),
        6);
  holds(certificate_of(sizes().capacity(Capacity(0.75).overflow("next_best")),
                       /*decides_per_token=*/false),
        6);
  MoE biased(sizes().gate(Gate().num_groups(2)).balance(Balance(0.1).selection_bias_rate(0.1)));
  holds(certificate_of(biased), 7);
  MoE assisted(sizes().assistance(torchmoe::nn::Assistance({1, 2, 3, 0}).threshold(1.5)));
  assisted->to(torch::kFloat64);
  assisted->assistance->assisted.fill_(1);
  // Its table of backups does not follow experts that change places.
  holds(certificate_of(assisted, true, nullptr, /*may_exchange=*/false), 6);
}

TEST_CASE("a declared gradient is the derivative of its surrogate", "[nn]") {
  torch::manual_seed(0);
  MoE served(sizes().gate(Gate().estimator("straight_through")));
  holds(certificate_of(served, true, straight_through(/*dense=*/false)), 6);
  MoE all(sizes().gate(Gate().estimator("straight_through_dense")));
  holds(certificate_of(all, true, straight_through(/*dense=*/true)), 6);

  MoE scaled(MoEOptions(4, 3, 4, 2).balance(0).router(RouterOptions(4, 4).usage_scaling(true)));
  scaled->to(torch::kFloat64);
  auto& router = *scaled->router().as<RouterImpl>();
  router.usage.copy_(torch::tensor({0.25, 0.25, 0.25, 0.25}));
  const Surrogate by_usage = [](MoE& moe,
                                const Tensor& at) -> std::function<Tensors(const Tensor&)> {
    auto& router = *moe->router().as<RouterImpl>();
    const auto ids = moe(at).routing.indices;
    const auto weight = router.weight.detach().clone();
    return [=, &moe, &router](const Tensor& x) -> Tensors {
      const auto logits = scaled_logits(router, x, weight);
      const auto weights = torchmoe::gate_weights(logits, ids, "softmax", "topk", "exact");
      return {moe->experts()(x, ids, weights), torch::zeros({}, torch::kFloat64)};
    };
  };
  // Of equal usage, so that experts may change places.
  holds(certificate_of(scaled, true, by_usage), 6);
}

TEST_CASE("a wrong surrogate is found", "[nn]") {
  torch::manual_seed(0);
  MoE moe(sizes().gate(Gate().estimator("straight_through")));
  for (const Surrogate& wrong : {Surrogate(), straight_through(/*dense=*/true)}) {
    const auto certificate = certificate_of(moe, true, wrong);
    REQUIRE_FALSE(certificate.failures.empty());
    CHECK(certificate.failures[0].law == "gradients");
    CHECK_THAT(certificate.failures[0].message, contains("the gradient of "));
  }
  const Surrogate short_of_losses = [](MoE& layer, const Tensor&) {
    return [&layer](const Tensor& x) -> Tensors { return {layer(x).hidden_states}; };
  };
  CHECK_THAT(certificate_of(moe, true, short_of_losses).to_string(),
             contains("surrogate must return as many tensors as forward, 2, got 1"));
}
