#include "nn/shared_experts.h"

#include "catch2.h"
#include "nn/moe.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::MoE;
using torchmoe::nn::MoEOptions;
using torchmoe::nn::SharedExperts;

namespace {

MoEOptions sizes() {
  return {6, 5, 4, 2};
}

Tensor tokens() {
  return wave({7, 6}, 0, 1, torch::kFloat32);
}

}  // namespace

TEST_CASE("shared experts serve every token that counts", "[nn]") {
  SharedExperts shared(torchmoe::nn::SharedExpertsOptions(6, 3).activation("gelu").bias(true));
  MoE moe(sizes().shared_experts(shared).routed_scaling_factor(2.5));
  const auto alone = shared(tokens());
  CHECK(alone.sizes() == tokens().sizes());
  const auto with = moe(tokens()).hidden_states;
  const auto routed =
      moe->experts()(tokens(), moe(tokens()).routing.indices, moe(tokens()).routing.weights);
  CHECK(torch::equal(with, 2.5 * routed + alone));
  auto mask = torch::ones({7}, torch::kBool);
  mask[2] = false;
  CHECK(moe(tokens(), mask).hidden_states[2].eq(0).all().item<bool>());
  CHECK(moe->named_parameters().contains("shared_experts.experts.up_proj_bias"));
}
