#include "nn/assistance.h"

#include <vector>

#include "catch2.h"
#include "nn/layers.h"
#include "nn/moe.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Assistance;
using torchmoe::nn::Capacity;
using torchmoe::nn::MoE;

TEST_CASE("an expert under load is assisted, and no longer", "[nn]") {
  MoE moe(
      sizes()
          .capacity(Capacity(4))
          .assistance(Assistance({1, 2, 3, 0}).threshold(1.2).lower_threshold(1.1).patience(2)));
  const auto share = [&](double of_first) {
    const torch::NoGradGuard no_grad;
    const double rest = (1 - of_first) / 3;
    usage_of(moe).copy_(torch::tensor({of_first, rest, rest, rest}));
    moe->update(routing_of({10, 10, 10, 10}));
    return moe->assistance->assisted;
  };
  CHECK(share(0.4).sum().item<double>() == 0);
  CHECK(torch::equal(share(0.4), torch::tensor({1.0, 0.0, 0.0, 0.0})));
  const auto routing = moe(tokens()).routing;
  CHECK(routing.selected.size(1) == 3);
  const auto of_first = routing.selected.narrow(1, 0, 2).eq(0).any(1);
  const auto of_helper = routing.selected.narrow(1, 0, 2).eq(1).any(1);
  const auto helped = routing.selected.select(1, 2);
  CHECK(torch::equal(helped.eq(1), of_first.logical_and(of_helper.logical_not())));
  CHECK(torch::equal(helped.eq(-1), of_first.logical_and(of_helper.logical_not()).logical_not()));
  CHECK(routing.kept_per_expert.sum().item<int64_t>() > 24);
  CHECK(share(0.29).select(0, 0).item<double>() == 1);  // between the thresholds
  CHECK(share(0.26).sum().item<double>() == 0);
}

TEST_CASE("assistance checks its settings by itself too", "[nn]") {
  using torchmoe::nn::AssistanceState;
  CHECK_THROWS_WITH(AssistanceState(Assistance({1, 0}).patience(0), 1),
                    contains("Assistance: patience must be >= 1, got 0"));
  CHECK_THROWS_WITH(AssistanceState(Assistance({1, 0}), 0),
                    contains("Assistance: least_experts must be >= 1, got 0"));
}
