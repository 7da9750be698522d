#include "ops/router_z_loss.h"

#include <cmath>

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::router_z_loss;

namespace {

Tensor fixture_mask() {
  return torch::arange(12).remainder(3).ne(1);
}

}  // namespace

TEST_CASE("router_z_loss: the fixture", "[router_z_loss]") {
  CHECK(router_z_loss(fixture_logits()).item<double>() == near(4.8198965836, 1e-10));
}

TEST_CASE("router_z_loss: values", "[router_z_loss]") {
  for (const auto dtype : kFloatTypes) {
    for (const auto& [t, e] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {37, 5}, {12, 67}}) {
      INFO(dtype << " T " << t << " E " << e);
      const Tensor logits = wave({t, e}, 0, 3, dtype);
      const Tensor mask = torch::arange(t).remainder(3).ne(1);
      const Tensor loss = router_z_loss(logits);
      CHECK(loss.dim() == 0);
      CHECK(loss.scalar_type() == (dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32));
      const double plain = torchmoe::reference::router_z_loss(logits);
      CHECK(difference(loss, torch::tensor(plain, torch::kDouble), t + e) == "");
      CHECK(torch::equal(router_z_loss(strided(logits)), loss));
      const double masked = torchmoe::reference::router_z_loss(logits, mask);
      CHECK(difference(router_z_loss(logits, mask), torch::tensor(masked, torch::kDouble), t + e) ==
            "");
    }
  }
}

TEST_CASE("router_z_loss: leading dimensions are pooled", "[router_z_loss]") {
  const Tensor logits = fixture_logits(), mask = fixture_mask();
  CHECK(torch::equal(router_z_loss(logits.view({2, 2, 3, 4})), router_z_loss(logits)));
  CHECK(torch::equal(router_z_loss(logits.view({3, 4, 4}), mask.view({3, 4})),
                     router_z_loss(logits, mask)));
  CHECK(router_z_loss(logits[0]).item<double>() ==
        near(torchmoe::reference::router_z_loss(logits.slice(0, 0, 1))));
}

TEST_CASE("router_z_loss: large logits do not overflow", "[router_z_loss]") {
  const Tensor logits = torch::tensor({{1000., 0.}, {-1000., -1000.}}, torch::kDouble);
  const double low = -1000 + std::log(2.0);
  CHECK(router_z_loss(logits).item<double>() == near((1e6 + low * low) / 2));
}

TEST_CASE("router_z_loss: no counted token gives 0, and a masked NaN does not count",
          "[router_z_loss]") {
  CHECK(router_z_loss(torch::empty({0, 4})).item<double>() == 0);
  Tensor logits = wave({3, 4});
  logits[1].fill_(std::nan(""));
  logits.requires_grad_();
  CHECK(std::isnan(router_z_loss(logits).item<double>()));
  CHECK(router_z_loss(logits, torch::zeros({3}, torch::kBool)).item<double>() == 0);
  const Tensor loss = router_z_loss(logits, torch::tensor({1, 0, 1}).to(torch::kBool));
  CHECK(std::isfinite(loss.item<double>()));
  loss.backward();
  CHECK(torch::equal(logits.grad()[1], torch::zeros({4}, torch::kDouble)));
  CHECK(logits.grad().isfinite().all().item<bool>());
}

TEST_CASE("router_z_loss: gradients", "[router_z_loss]") {
  const auto plain = [](const Tensors& in) { return router_z_loss(in[0]); };
  const auto masked = [](const Tensors& in) { return router_z_loss(in[0], fixture_mask()); };
  CHECK(gradcheck(plain, {fixture_logits().requires_grad_()}).message == "");
  CHECK(gradcheck(masked, {fixture_logits().requires_grad_()}).message == "");
  CHECK(gradcheck(plain, {leaf({2, 3, 4})}).message == "");
  CHECK(gradcheck(plain, {leaf({3, 1})}).message == "");
  CHECK(gradgradcheck(plain, {leaf({5, 4})}).message == "");
  CHECK(gradgradcheck(masked, {fixture_logits().requires_grad_()}).message == "");
}

TEST_CASE("router_z_loss: errors", "[router_z_loss]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor logits = torch::zeros({3, 4});
  CHECK_THROWS_WITH(router_z_loss(torch::tensor(1.0)),
                    contains("router_z_loss: logits must be [..., num_experts]"));
  CHECK_THROWS_WITH(router_z_loss(torch::zeros({3, 0})),
                    contains("router_z_loss: logits must be") && contains("got shape [3, 0]"));
  CHECK_THROWS_WITH(router_z_loss(logits.to(torch::kLong)),
                    contains("router_z_loss: logits must be float32"));
  CHECK_THROWS_WITH(router_z_loss(logits, torch::ones({3})),
                    contains("router_z_loss: token_mask must be Bool, got Float"));
  CHECK_THROWS_WITH(router_z_loss(logits, torch::ones({2}, torch::kBool)),
                    contains("router_z_loss: token_mask must") && contains("got shape [2]"));
}
