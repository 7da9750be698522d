#include "nn/selection_bias.h"

#include "catch2.h"
#include "nn/layers.h"
#include "nn/moe.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Balance;
using torchmoe::nn::MoE;

TEST_CASE("update moves the selection bias against the load", "[nn]") {
  using torchmoe::update_selection_bias;
  const auto counts = torch::tensor({8, 0, 4, 4});
  CHECK(torch::allclose(update_selection_bias(torch::zeros({4}), counts, 0.5),
                        torch::tensor({-0.5, 0.5, 0.0, 0.0})));
  const auto centred =
      update_selection_bias(torch::zeros({3}), torch::tensor({6, 0, 0}), 0.5, true);
  CHECK(torch::allclose(centred, torch::tensor({-2.0, 1.0, 1.0}) / 3));
  CHECK(
      torch::equal(update_selection_bias(centred, torch::zeros({3}, torch::kLong), 0.5), centred));
  CHECK_THROWS_WITH(
      update_selection_bias(centred, counts, 0.5),
      contains("update_selection_bias: tokens_per_expert must be numbers [num_experts]"));

  MoE moe(sizes().balance(Balance(0).selection_bias_rate(0.125)));
  const auto routing = moe(tokens()).routing;
  moe->update(routing);
  CHECK(torch::equal(moe->selection_bias,
                     update_selection_bias(torch::zeros({4}), routing.tokens_per_expert, 0.125)));
  {
    const torch::NoGradGuard no_grad;
    moe->selection_bias.copy_(torch::tensor({-9, 9, -9, 9}));
  }
  const auto biased = moe(tokens()).routing;
  CHECK(torch::equal(biased.tokens_per_expert, torch::tensor({0, 12, 0, 12})));
  // The bias ranks and does not weigh.
  CHECK(torch::allclose(biased.weights.sum(1), torch::ones({12})));
}
