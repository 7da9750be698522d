#include "ops/scale_gradient.h"

#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::scale_gradient;

TEST_CASE("scale_gradient: a copy of x", "[scale_gradient]") {
  for (const auto dtype : kFloatTypes) {
    const Tensor x = wave({3, 4}, 0, 1, dtype);
    const Tensor y = scale_gradient(x, wave({3, 1}, 1, 1, torch::kFloat32));
    CHECK(torch::equal(y, x));
    CHECK(y.scalar_type() == dtype);
    CHECK_FALSE(y.is_alias_of(x));
    CHECK(torch::equal(scale_gradient(strided(x), torch::ones({})), x));
  }
  CHECK(scale_gradient(torch::empty({0, 4}), torch::ones({4})).sizes() == at::IntArrayRef{0, 4});
}

TEST_CASE("scale_gradient: the gradient arrives scaled", "[scale_gradient]") {
  const std::vector<std::vector<int64_t>> shapes = {{}, {4}, {3, 1}, {1, 4}, {3, 4}};
  for (const auto& shape : shapes) {
    const Tensor x = leaf({3, 4}), scale = wave(shape, 1), grad = wave({3, 4}, 2);
    scale_gradient(x, scale).backward(grad);
    CHECK(torch::equal(x.grad(), grad * scale));
  }
}

TEST_CASE("scale_gradient: gradients keep x's type, scale has none", "[scale_gradient]") {
  const Tensor x = wave({3, 4}, 0, 1, torch::kBFloat16).requires_grad_();
  const Tensor scale = torch::full({3, 1}, 0.5).requires_grad_();
  scale_gradient(x, scale).sum().backward();
  CHECK(x.grad().scalar_type() == torch::kBFloat16);
  CHECK(torch::equal(x.grad(), torch::full_like(x, 0.5)));
  CHECK_FALSE(scale.grad().defined());
}

TEST_CASE("scale_gradient: second derivatives", "[scale_gradient]") {
  const Tensor scale = wave({3, 1}, 1);
  const auto square = [&](const Tensors& in) { return scale_gradient(in[0], scale).square(); };
  CHECK(
      gradgradcheck([&](const Tensors& in) { return scale_gradient(in[0], scale); }, {leaf({3, 4})})
          .message == "");
  // d/dx of scale * 2 y, through the copy again: 2 scale^2.
  const Tensor x = leaf({3, 4});
  const auto first =
      torch::autograd::grad({square({x}).sum()}, {x}, {}, std::nullopt, /*create_graph=*/true);
  CHECK(difference(first[0], 2 * scale * x, 1) == "");
  first[0].sum().backward();
  CHECK(difference(x.grad(), (2 * scale * scale).expand({3, 4}), 1) == "");
}

TEST_CASE("scale_gradient: errors", "[scale_gradient]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor x = torch::zeros({3, 4});
  CHECK_THROWS_WITH(scale_gradient(x.to(torch::kLong), x),
                    contains("scale_gradient: x must be float32"));
  CHECK_THROWS_WITH(scale_gradient(x, x.to(torch::kLong)),
                    contains("scale_gradient: scale must be float32"));
  for (const auto& shape : std::vector<std::vector<int64_t>>{{3}, {2, 3, 4}, {3, 4, 1}}) {
    CHECK_THROWS_WITH(scale_gradient(x, torch::zeros(shape)),
                      contains("scale_gradient: scale must broadcast to x's shape [3, 4], got"));
  }
}
