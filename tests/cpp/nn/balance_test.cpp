#include "nn/balance.h"

#include <optional>
#include <vector>

#include "catch2.h"
#include "nn/layers.h"
#include "nn/moe.h"
#include "ops/load_balancing_loss.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Balance;
using torchmoe::nn::MoE;
using torchmoe::nn::RouterOptions;

TEST_CASE("counts of all processes move every one alike", "[nn]") {
  // Two processes that wait for nobody: the other's counts are known.
  const auto other = torch::tensor({0, 24, 0, 0});
  MoE moe(sizes()
              .balance(Balance(0).selection_bias_rate(0.5))
              .router(RouterOptions(6, 4).track_usage(true))
              .all_reduce([&](const Tensor& counts) { return counts + other; }));
  moe->update(routing_of({6, 6, 6, 6}));
  CHECK(torch::allclose(moe->selection_bias, torch::tensor({0.5, -0.5, 0.5, 0.5})));
  CHECK(torch::allclose(
      usage_of(moe), 0.99 * 0.25 + 0.01 * torch::tensor({6, 30, 6, 6}) / 48, 1e-6, 1e-7));
}

TEST_CASE("what all_reduce returns is checked", "[nn]") {
  MoE moe(sizes().balance(Balance(0).selection_bias_rate(0.5)).all_reduce([](const Tensor& counts) {
    return counts.sum();
  }));
  CHECK_THROWS_WITH(
      moe->update(routing_of({6, 6, 6, 6})),
      contains("MoE: all_reduce must return a sum of shape [4] and type Long, got Long "
               "of shape []"));
}

TEST_CASE("the fractions of a global batch are those of all processes", "[nn]") {
  const auto whole = tokens();
  const auto x = whole.narrow(0, 0, 8);
  MoE alone(sizes());
  MoE moe(sizes()
              .balance(Balance(0.01).fraction_from("global_batch"))
              .all_reduce([&](const Tensor& mine) {
                const auto counts = alone(whole.narrow(0, 8, 4)).routing.tokens_per_expert;
                return mine + torch::cat({counts, torch::tensor({4, 1})});
              }));
  {
    const torch::NoGradGuard no_grad;
    auto parameters = alone->parameters();
    for (size_t i = 0; i < parameters.size(); ++i) {
      parameters[i].copy_(moe->parameters()[i]);
    }
  }
  const auto fraction = alone(whole).routing.tokens_per_expert.to(torch::kFloat32) / 24;
  const auto own = torchmoe::load_balancing_loss(moe(x).routing.logits, fraction, "softmax");
  const auto expected = own * (8.0 * 2 / 12);
  CHECK(torch::allclose(moe(x).routing.losses.at("load_balancing_loss"), expected));
  moe->eval();
  CHECK(torch::equal(moe(x).aux_loss, alone(x).aux_loss));
}

TEST_CASE("micro-batches with earlier counts have the last one's fractions of all", "[nn]") {
  MoE moe(sizes());
  const auto first = moe(tokens(12, 0)).routing.tokens_per_expert;
  const auto second = moe(tokens(12, 0.5));
  const auto all = (first + second.routing.tokens_per_expert).to(torch::kFloat32) / 48;
  const auto expected = torchmoe::load_balancing_loss(second.routing.logits, all, "softmax");
  CHECK(torch::equal(moe(tokens(12, 0.5), Tensor(), first).routing.losses.at("load_balancing_loss"),
                     expected));
}
