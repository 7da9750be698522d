#include "nn/router.h"

#include <cmath>
#include <sstream>

#include "catch2.h"
#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Router;
using torchmoe::nn::RouterOptions;

TEST_CASE("Router gives the logits of a linear layer", "[nn]") {
  for (const bool bias : {false, true}) {
    CAPTURE(bias);
    Router router(RouterOptions(5, 3).bias(bias));
    router->to(torch::kFloat64);
    const auto x = wave({7, 5});
    const auto expected = torchmoe::reference::router_logits(
        x, router->weight, bias ? std::optional<Tensor>(router->bias) : std::nullopt);
    CHECK(difference(router(x), expected.detach(), 6).empty());
    CHECK(router->named_parameters().contains("weight"));
    CHECK(router->named_parameters().contains("bias") == bias);
    CHECK(router(x).requires_grad());
  }
}

TEST_CASE("Router starts within 1 / sqrt(hidden_size)", "[nn]") {
  Router router(RouterOptions(64, 32).bias(true));
  for (const auto& parameter : router->parameters()) {
    CHECK(parameter.abs().max().item<double>() <= 0.125);
    CHECK(parameter.abs().max().item<double>() > 0.1);
  }
  const auto before = router->weight.clone();
  torch::manual_seed(3);
  router->reset_parameters();
  CHECK_FALSE(torch::equal(router->weight, before));
  torch::manual_seed(3);
  CHECK(torch::equal(Router(RouterOptions(64, 32).bias(true))->weight, router->weight));
}

TEST_CASE("Router jitters its input in training only", "[nn]") {
  Router router(RouterOptions(4, 2).input_jitter(0.25));
  const auto x = torch::ones({100, 4});
  {
    torch::NoGradGuard no_grad;
    router->weight.fill_(0);
    router->weight.index_put_({0, 0}, 1);  // the first logit is the first input
  }
  const auto seen = router(x).select(1, 0);
  CHECK(seen.min().item<double>() >= 0.75);
  CHECK(seen.max().item<double>() <= 1.25);
  CHECK(seen.std().item<double>() > 0.1);
  torch::manual_seed(5);
  const auto once = router(x);
  torch::manual_seed(5);
  CHECK(torch::equal(router(x), once));
  router->eval();
  CHECK(torch::equal(router(x).select(1, 0), torch::ones({100})));
}

TEST_CASE("Router jitters 16-bit input in float32", "[nn]") {
  Router router(RouterOptions(4, 2).input_jitter(0.001).bias(true));
  router->to(torch::kBFloat16);
  const auto x = torch::ones({50, 4}, torch::kBFloat16);
  const auto logits = router(x);
  CHECK(logits.scalar_type() == torch::kFloat32);
  CHECK(std::get<0>(torch::_unique(logits.select(1, 0))).numel() > 10);
  logits.sum().backward();
  CHECK(router->weight.grad().scalar_type() == torch::kBFloat16);
  CHECK(router->bias.grad().scalar_type() == torch::kBFloat16);
}

TEST_CASE("Router adds noise to the logits in training only", "[nn]") {
  Router router(RouterOptions(4, 3).logit_noise(0.5));
  const auto x = wave({6, 4}, 0, 1, torch::kFloat32);
  torch::manual_seed(5);
  const auto noisy = router(x);
  torch::manual_seed(5);
  const auto noise = torch::randn({6, 3});
  router->eval();
  CHECK(torch::equal(noisy, router(x) + 0.5 * noise));
}

TEST_CASE("Router clones, prints and refuses", "[nn]") {
  Router router(RouterOptions(4, 3).bias(true).input_jitter(0.1).logit_noise(2));
  const auto copy = std::dynamic_pointer_cast<torchmoe::nn::RouterImpl>(router->clone());
  CHECK(torch::equal(copy->weight, router->weight));
  CHECK(torch::equal(copy->bias, router->bias));
  CHECK_FALSE(copy->weight.is_same(router->weight));
  CHECK(copy->weight.is_same(copy->named_parameters()["weight"]));
  std::ostringstream text;
  text << router;
  CHECK(text.str() ==
        "torchmoe::nn::Router(hidden_size=4, num_experts=3, bias=true, input_jitter=0.1, "
        "logit_noise=2)");
  CHECK_THROWS_WITH(Router(0, 3), contains("Router: hidden_size must be >= 1, got 0"));
  CHECK_THROWS_WITH(Router(4, 0), contains("Router: num_experts must be >= 1, got 0"));
  CHECK_THROWS_WITH(Router(RouterOptions(4, 3).input_jitter(-0.1)),
                    contains("Router: input_jitter must be a finite number >= 0, got -0.1"));
  CHECK_THROWS_WITH(Router(RouterOptions(4, 3).logit_noise(NAN)),
                    contains("Router: logit_noise must be a finite number >= 0, got nan"));
  CHECK_THROWS_WITH(router(torch::ones({2, 5})), contains("router_logits: "));
}
