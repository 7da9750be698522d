#include "nn/shared_experts.h"

#include "catch2.h"
#include "nn/layers.h"
#include "nn/moe.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::MoE;
using torchmoe::nn::SharedExperts;

TEST_CASE("shared experts serve every token that counts", "[nn]") {
  SharedExperts shared(torchmoe::nn::SharedExpertsOptions(6, 3).activation("gelu").bias(true));
  MoE moe(sizes().shared_experts(shared).routed_scaling_factor(2.5));
  const auto alone = shared(tokens(7));
  CHECK(alone.sizes() == tokens(7).sizes());
  const auto with = moe(tokens(7)).hidden_states;
  const auto routed =
      moe->experts()(tokens(7), moe(tokens(7)).routing.indices, moe(tokens(7)).routing.weights);
  CHECK(torch::equal(with, 2.5 * routed + alone));
  auto mask = torch::ones({7}, torch::kBool);
  mask[2] = false;
  CHECK(moe(tokens(7), mask).hidden_states[2].eq(0).all().item<bool>());
  CHECK(moe->named_parameters().contains("shared_experts.experts.up_proj_bias"));
}
