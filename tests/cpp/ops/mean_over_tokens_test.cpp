#include "ops/mean_over_tokens.h"

#include <cmath>

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::mean_over_tokens;

TEST_CASE("mean_over_tokens: values", "[mean_over_tokens]") {
  for (const auto dtype : kFloatTypes) {
    for (const auto& [t, c] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {37, 5}, {700, 3}}) {
      INFO(dtype << " T " << t << " C " << c);
      const Tensor values = wave({t, c}, 0, 3, dtype);
      const Tensor mask = torch::arange(t).remainder(3).ne(1);
      const Tensor mean = mean_over_tokens(values);
      CHECK(mean.scalar_type() == (dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32));
      CHECK(difference(mean, torchmoe::reference::mean_over_tokens(values), t) == "");
      CHECK(torch::equal(mean_over_tokens(strided(values)), mean));
      CHECK(difference(mean_over_tokens(values, mask),
                       torchmoe::reference::mean_over_tokens(values, mask),
                       t) == "");
    }
  }
}

TEST_CASE("mean_over_tokens: leading dimensions are independent", "[mean_over_tokens]") {
  const Tensor values = wave({2, 3, 6, 4}), mask = wave({2, 3, 6}, 2).gt(-0.3);
  const Tensor plain = mean_over_tokens(values), masked = mean_over_tokens(values, mask);
  CHECK(plain.sizes() == at::IntArrayRef{2, 3, 4});
  for (int64_t a = 0; a < 2; ++a) {
    for (int64_t b = 0; b < 3; ++b) {
      CHECK(torch::equal(plain[a][b], mean_over_tokens(values[a][b])));
      CHECK(torch::equal(masked[a][b], mean_over_tokens(values[a][b], mask[a][b])));
    }
  }
}

TEST_CASE("mean_over_tokens: no counted token gives 0, and a masked NaN does not count",
          "[mean_over_tokens]") {
  CHECK(torch::equal(mean_over_tokens(torch::empty({0, 4})), torch::zeros({4})));
  CHECK(mean_over_tokens(torch::empty({5, 0})).sizes() == at::IntArrayRef{0});
  Tensor values = wave({3, 4});
  values[1].fill_(std::nan(""));
  values.requires_grad_();
  const Tensor mask = torch::tensor({1, 0, 1}).to(torch::kBool);
  const Tensor mean = mean_over_tokens(values, mask);
  CHECK(difference(mean, (values[0] + values[2]) / 2, 2) == "");
  mean.sum().backward();
  CHECK(torch::equal(values.grad()[1], torch::zeros({4}, torch::kDouble)));
  CHECK(torch::equal(mean_over_tokens(values, torch::zeros({3}, torch::kBool)),
                     torch::zeros({4}, torch::kDouble)));
}

TEST_CASE("mean_over_tokens: gradients of both orders", "[mean_over_tokens]") {
  const Tensor mask = wave({2, 5}, 2).gt(-0.3);
  const auto plain = [](const Tensors& in) { return mean_over_tokens(in[0]); };
  const auto masked = [&](const Tensors& in) { return mean_over_tokens(in[0], mask); };
  for (const auto& [function, sizes] :
       std::vector<std::pair<std::function<Tensor(const Tensors&)>, std::vector<int64_t>>>{
           {plain, {5, 4}}, {masked, {2, 5, 4}}}) {
    CHECK(gradcheck(function, {leaf(sizes)}).message == "");
    CHECK(gradgradcheck(function, {leaf(sizes)}).message == "");
  }
  const Tensor narrow = wave({3, 4}, 0, 1, torch::kBFloat16).requires_grad_();
  mean_over_tokens(narrow).sum().backward();
  CHECK(narrow.grad().scalar_type() == torch::kBFloat16);
}

TEST_CASE("mean_over_tokens: errors", "[mean_over_tokens]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor values = torch::zeros({3, 4});
  CHECK_THROWS_WITH(mean_over_tokens(values[0]),
                    contains("mean_over_tokens: values must be [..., num_tokens, num_columns], "
                             "got shape [4]"));
  CHECK_THROWS_WITH(mean_over_tokens(values.to(torch::kLong)),
                    contains("mean_over_tokens: values must be float32"));
  CHECK_THROWS_WITH(mean_over_tokens(values, torch::ones({3})),
                    contains("mean_over_tokens: token_mask must be Bool, got Float"));
  CHECK_THROWS_WITH(mean_over_tokens(values, torch::ones({4}, torch::kBool)),
                    contains("mean_over_tokens: token_mask must") && contains("got shape [4]"));
}
