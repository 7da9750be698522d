#include "ops/router_logits.h"

#include <cmath>
#include <limits>

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::router_logits;

TEST_CASE("router_logits: values", "[router_logits]") {
  struct Size {
    int64_t tokens, hidden, experts;
  };
  for (const auto& [t, h, e] : {Size{1, 1, 1}, Size{7, 3, 5}, Size{33, 65, 17}, Size{0, 4, 3}}) {
    for (const auto dtype : kFloatTypes) {
      INFO("T " << t << " H " << h << " E " << e << " " << dtype);
      const Tensor x = wave({t, h}, 0, 1, dtype), w = wave({e, h}, 1, 1, dtype);
      const Tensor b = wave({e}, 2, 1, dtype);
      const auto wide = dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
      const Tensor logits = router_logits(x, w, b);
      CHECK(logits.scalar_type() == wide);
      CHECK(difference(logits, torchmoe::reference::router_logits(x, w, b), h + 1) == "");
      const Tensor bare = router_logits(strided(x), strided(w));
      CHECK(difference(bare, torchmoe::reference::router_logits(x, w), h) == "");
    }
  }
}

TEST_CASE("router_logits: what is not finite stays with its token", "[router_logits]") {
  Tensor x = wave({3, 4}, 0, 1, torch::kFloat32);
  x[1][2] = std::nan("");
  x[2][0] = std::numeric_limits<double>::infinity();
  const Tensor logits = router_logits(x, wave({2, 4}, 1, 1, torch::kFloat32));
  CHECK(logits[0].isfinite().all().item<bool>());
  CHECK(logits[1].isnan().all().item<bool>());
  CHECK(logits[2].isinf().all().item<bool>());
}

TEST_CASE("router_logits: gradients", "[router_logits]") {
  const auto with_bias = [](const Tensors& in) { return router_logits(in[0], in[1], in[2]); };
  const auto without = [](const Tensors& in) { return router_logits(in[0], in[1]); };
  const Tensor x = leaf({5, 3}), w = leaf({4, 3}, 1), b = leaf({4}, 2);
  CHECK(gradcheck(with_bias, {x, w, b}).message == "");
  CHECK(gradcheck(without, {x, w}).message == "");
  CHECK(gradcheck(without, {strided(wave({5, 3})).requires_grad_(), w}).message == "");
  CHECK(gradcheck(with_bias, {leaf({0, 3}), w, b}).message == "");
  CHECK(gradgradcheck(with_bias, {x, w, b}).message == "");
  CHECK(gradgradcheck(without, {x, w}).message == "");
}

TEST_CASE("router_logits: gradients keep their input's type", "[router_logits]") {
  const Tensor x = wave({5, 3}, 0, 1, torch::kBFloat16).requires_grad_();
  const Tensor w = wave({4, 3}, 1, 1, torch::kBFloat16).requires_grad_();
  router_logits(x, w).sum().backward();
  CHECK(x.grad().scalar_type() == torch::kBFloat16);
  const Tensor expected = w.detach().to(torch::kFloat64).sum(0).expand({5, 3});
  CHECK(difference(x.grad(), expected, 4) == "");
}

TEST_CASE("router_logits: errors", "[router_logits]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor x = torch::zeros({5, 3}), w = torch::zeros({4, 3});
  CHECK_THROWS_WITH(router_logits(x[0], w),
                    contains("router_logits: x must be [") && contains("], got shape [3]"));
  CHECK_THROWS_WITH(router_logits(x, torch::zeros({4, 2})),
                    contains("router_logits: weight must be [") && contains("], got shape [4, 2]"));
  CHECK_THROWS_WITH(router_logits(x, w, torch::zeros({3})),
                    contains("router_logits: bias must be [") && contains("], got shape [3]"));
  CHECK_THROWS_WITH(router_logits(x.to(torch::kLong), w),
                    contains("router_logits: x must be float32, float64, ") && contains("Long"));
  CHECK_THROWS_WITH(router_logits(x, w.to(torch::kDouble)),
                    contains("router_logits: x must have the dtype of weight"));
  CHECK_THROWS_WITH(router_logits(x, w, torch::zeros({4}, torch::kDouble)),
                    contains("router_logits: bias must have the dtype of x"));
}
