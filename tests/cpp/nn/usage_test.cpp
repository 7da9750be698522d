#include "nn/usage.h"

#include <vector>

#include "catch2.h"
#include "nn/layers.h"
#include "nn/moe.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Capacity;
using torchmoe::nn::MoE;
using torchmoe::nn::Remembering;
using torchmoe::nn::RouterImpl;
using torchmoe::nn::RouterOptions;
using torchmoe::nn::UsageTracking;

namespace {

// One that keeps usage.
struct CountingRouterImpl : Remembering<CountingRouterImpl>, UsageTracking {
  CountingRouterImpl() { reset(); }
  void reset() override {
    weight = register_parameter("weight", wave({4, 6}, 0, 1, torch::kFloat32));
    usage = register_wide_buffer("usage", torch::full({4}, 0.25));
  }
  Tensor forward(const Tensor& x) { return x.matmul(weight.t()); }

  Tensor weight;
};
TORCH_MODULE(CountingRouter);

}  // namespace

TEST_CASE("update moves usage towards the shares of the step", "[nn]") {
  MoE moe(sizes().router(RouterOptions(6, 4).track_usage(true)));
  CHECK(torch::equal(usage_of(moe), torch::full({4}, 0.25)));
  moe->update({routing_of({4, 0, 2, 2}), routing_of({2, 2, 2, 2})});
  const auto expected = 0.99 * 0.25 + 0.01 * torch::tensor({6, 2, 4, 4}) / 16;
  CHECK(torch::allclose(usage_of(moe), expected, 1e-6, 1e-7));
  const auto before = usage_of(moe).clone();
  moe->update(routing_of({0, 0, 0, 0}));
  CHECK(torch::equal(usage_of(moe), before));
  moe->router().as<RouterImpl>()->usage_decay = 1;
  CHECK_THROWS_WITH(moe->update(routing_of({1, 1, 1, 1})),
                    contains("Router: usage_decay must be in [0, 1), got 1.0"));
}

TEST_CASE("a router of one's own keeps usage", "[nn]") {
  MoE moe(sizes().router(CountingRouter()).capacity(Capacity(1).dynamic(true)));
  const auto routing = moe(tokens()).routing;
  moe->update(routing);
  const auto share = routing.tokens_per_expert.to(torch::kFloat32) / 24;
  const auto& usage = moe->router().as<CountingRouterImpl>()->usage;
  CHECK(torch::allclose(usage, 0.99 * 0.25 + 0.01 * share));
  CHECK(torch::equal(moe->named_buffers()["router.usage"], usage));
  CountingRouter other;
  other->usage.set_data(torch::full({5}, 0.2));
  CHECK_THROWS_WITH(MoE(sizes().router(other)),
                    contains("MoE: router must have usage of shape [4], got [5]"));
  CHECK_THROWS_WITH(MoE(sizes().router(DeepRouter()).capacity(Capacity(1).dynamic(true))),
                    contains("MoE: router must keep usage for a dynamic capacity, as "
                             "Router(track_usage=True) does, got DeepRouter without"));
}
