#include "ops/attach_loss.h"

#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::attach_loss;

TEST_CASE("attach_loss: a copy of x", "[attach_loss]") {
  for (const auto dtype : kFloatTypes) {
    const Tensor x = wave({3, 4}, 0, 1, dtype), y = attach_loss(x, torch::tensor(7.0f));
    CHECK(torch::equal(y, x));
    CHECK(y.scalar_type() == dtype);
    CHECK_FALSE(y.is_alias_of(x));
    CHECK(torch::equal(attach_loss(strided(x), torch::tensor(7.0f)), x));
  }
  CHECK(attach_loss(torch::empty({0, 4}), torch::ones({})).sizes() == at::IntArrayRef{0, 4});
}

TEST_CASE("attach_loss: x gets its gradient, the loss gets scale", "[attach_loss]") {
  for (const double scale : {1.0, 0.25, -3.0}) {
    const Tensor x = leaf({3, 4}), loss = leaf({}), grad = wave({3, 4}, 2);
    attach_loss(x, loss, scale).backward(grad);
    CHECK(torch::equal(x.grad(), grad));
    CHECK(loss.grad().item<double>() == scale);
  }
}

TEST_CASE("attach_loss: stands for adding the loss to the objective", "[attach_loss]") {
  const Tensor x = leaf({3, 4}), w = leaf({3, 4}, 1);
  const auto auxiliary = [&] { return (x * w).square().mean(); };
  (x.sin().sum() + 0.5 * auxiliary()).backward();
  const Tensor grad_x = x.grad().clone(), grad_w = w.grad().clone();
  x.mutable_grad() = Tensor();
  w.mutable_grad() = Tensor();
  attach_loss(x, auxiliary(), 0.5).sin().sum().backward();
  CHECK(difference(x.grad(), grad_x, 2) == "");
  CHECK(difference(w.grad(), grad_w, 2) == "");
}

TEST_CASE("attach_loss: either side may be constant", "[attach_loss]") {
  const Tensor loss = leaf({});
  attach_loss(torch::ones({2}, torch::kDouble), loss).sum().backward();
  CHECK(loss.grad().item<double>() == 1);
  const auto constant = [](const Tensors& in) {
    return attach_loss(in[0], torch::tensor(2.0, torch::kDouble));
  };
  CHECK(gradcheck(constant, {leaf({3, 4})}).message == "");
  CHECK(gradgradcheck(constant, {leaf({3, 4})}).message == "");
}

TEST_CASE("attach_loss: the loss keeps its type", "[attach_loss]") {
  const Tensor x = wave({2, 2}, 0, 1, torch::kBFloat16).requires_grad_();
  const Tensor loss = torch::tensor(1.0f).requires_grad_();
  attach_loss(x, loss).sum().backward();
  CHECK(x.grad().scalar_type() == torch::kBFloat16);
  CHECK(loss.grad().scalar_type() == torch::kFloat32);
}

TEST_CASE("attach_loss: second derivatives", "[attach_loss]") {
  const Tensor x = leaf({3}), w = leaf({3}, 1);
  // Linear in y, which would bring the loss along a second time.
  const Tensor y = attach_loss(x.square(), (w * w * w).sum(), 2);
  const auto first =
      torch::autograd::grad({y.sum()}, {x, w}, {}, std::nullopt, /*create_graph=*/true);
  (first[0].sum() + first[1].sum()).backward();
  CHECK(difference(x.grad(), torch::full({3}, 2.0, torch::kDouble), 1) == "");
  CHECK(difference(w.grad(), 12 * w, 1) == "");
}

TEST_CASE("attach_loss: errors", "[attach_loss]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor x = torch::zeros({3, 4}), loss = torch::zeros({});
  CHECK_THROWS_WITH(attach_loss(x.to(torch::kLong), loss),
                    contains("attach_loss: x must be float32"));
  CHECK_THROWS_WITH(attach_loss(x, torch::zeros({1})),
                    contains("attach_loss: loss must be a scalar, got shape [1]"));
  CHECK_THROWS_WITH(attach_loss(x, loss.to(torch::kLong)),
                    contains("attach_loss: loss must be float32"));
}
