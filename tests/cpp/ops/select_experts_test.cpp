#include "ops/select_experts.h"

#include <cmath>
#include <limits>

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::select_experts;

TEST_CASE("select_experts: the fixture", "[select_experts]") {
  CHECK(torch::equal(select_experts(fixture_logits(), 2), fixture_indices()));
}

TEST_CASE("select_experts: values", "[select_experts]") {
  struct Size {
    int64_t tokens, experts, top_k;
  };
  for (const auto& [t, e, k] : {Size{1, 1, 1}, Size{9, 5, 5}, Size{33, 67, 8}, Size{0, 4, 2}}) {
    for (const auto dtype : kFloatTypes) {
      INFO("T " << t << " E " << e << " K " << k << " " << dtype);
      // bfloat16 has few values, so that these scores tie.
      const Tensor scores = wave({t, e}, 0, 1, dtype);
      const Tensor expected = torchmoe::reference::select_experts(scores, k);
      CHECK(torch::equal(select_experts(scores, k), expected));
      CHECK(torch::equal(select_experts(strided(scores), k), expected));
    }
  }
}

TEST_CASE("select_experts: ties go to the lower id", "[select_experts]") {
  CHECK(torch::equal(select_experts(torch::zeros({2, 5}), 3), ids({{0, 1, 2}, {0, 1, 2}})));
  const Tensor scores = torch::tensor({{1., 3., 3., 1., 3.}, {-0., 0., -0., 0., 0.}});
  CHECK(torch::equal(select_experts(scores, 4), ids({{1, 2, 4, 0}, {0, 1, 2, 3}})));
}

TEST_CASE("select_experts: NaN after -inf, and every expert may be chosen", "[select_experts]") {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  const Tensor scores =
      torch::tensor({{nan, -inf, 1., inf}, {nan, nan, -inf, nan}, {-inf, -inf, -inf, -inf}});
  CHECK(torch::equal(select_experts(scores, 4), ids({{3, 2, 1, 0}, {2, 0, 1, 3}, {0, 1, 2, 3}})));
}

TEST_CASE("select_experts: selection_bias ranks, token_mask removes", "[select_experts]") {
  const Tensor scores = fixture_logits(), bias = wave({4}, 2, 3);
  const Tensor mask = torch::arange(12).remainder(3).ne(1);
  CHECK(torch::equal(select_experts(scores, 2, bias, mask),
                     torchmoe::reference::select_experts(scores, 2, bias, mask)));
  CHECK(torch::equal(select_experts(scores, 2, torch::zeros({4}, torch::kDouble)),
                     fixture_indices()));
  const Tensor none = torch::zeros({12}, torch::kBool);
  CHECK(select_experts(scores, 2, std::nullopt, none).eq(-1).all().item<bool>());
}

TEST_CASE("select_experts: no gradient", "[select_experts]") {
  CHECK_FALSE(select_experts(leaf({3, 4}), 2).requires_grad());
}

TEST_CASE("select_experts: errors", "[select_experts]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor scores = torch::zeros({5, 4});
  CHECK_THROWS_WITH(select_experts(scores[0], 2),
                    contains("select_experts: scores must be [") && contains("got shape [4]"));
  CHECK_THROWS_WITH(select_experts(scores.to(torch::kLong), 2),
                    contains("select_experts: scores must be float32"));
  for (const int64_t top_k : {0, 5, -1}) {
    CHECK_THROWS_AS(select_experts(scores, top_k), c10::ValueError);
    CHECK_THROWS_WITH(
        select_experts(scores, top_k),
        contains("select_experts: top_k must be in [1, 4], got " + std::to_string(top_k)));
  }
  CHECK_THROWS_WITH(select_experts(scores, 2, torch::zeros({5})),
                    contains("select_experts: selection_bias must") && contains("got shape [5]"));
  CHECK_THROWS_WITH(select_experts(scores, 2, torch::zeros({4}, torch::kLong)),
                    contains("select_experts: selection_bias must be float32"));
  CHECK_THROWS_WITH(select_experts(scores, 2, std::nullopt, torch::ones({4}, torch::kBool)),
                    contains("select_experts: token_mask must") && contains("got shape [4]"));
  CHECK_THROWS_WITH(select_experts(scores, 2, std::nullopt, torch::ones({5})),
                    contains("select_experts: token_mask must be Bool, got Float"));
}
