#include "ops/load_balancing_loss.h"

#include <cmath>
#include <limits>
#include <string>

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::load_balancing_loss;

namespace {

const std::vector<std::string> kScoreFunctions = {"softmax", "sigmoid"};

Tensor fixture_mask() {
  return torch::arange(12).remainder(3).ne(1);
}

}  // namespace

TEST_CASE("load_balancing_loss: the fixture", "[load_balancing_loss]") {
  const Tensor logits = fixture_logits();
  const Tensor counts = torch::tensor({4., 7., 8., 5.}, torch::kDouble);
  const Tensor first = torch::tensor({2., 2., 4., 4.}, torch::kDouble);
  const auto loss = [&](const Tensor& fraction) {
    return load_balancing_loss(logits, fraction, "softmax").item<double>();
  };
  CHECK(loss(counts / 24) == near(1.0243044476, 1e-10));
  CHECK(loss(counts / 12) == near(2.0486088952, 1e-10));
  CHECK(loss(first / 12) == near(1.0087047519, 1e-10));
}

TEST_CASE("load_balancing_loss: values", "[load_balancing_loss]") {
  for (const auto& score : kScoreFunctions) {
    for (const auto dtype : kFloatTypes) {
      INFO(score << " " << dtype);
      const Tensor logits = wave({37, 5}, 0, 3, dtype), fraction = wave({5}, 1).abs();
      const Tensor loss = load_balancing_loss(logits, fraction.to(torch::kFloat32), score);
      const Tensor expected = torch::tensor(
          torchmoe::reference::load_balancing_loss(logits, fraction.to(torch::kFloat32), score),
          torch::kDouble);
      CHECK(loss.dim() == 0);
      CHECK(loss.scalar_type() == (dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32));
      CHECK(difference(loss, expected, 37 + 5) == "");
      CHECK(torch::equal(load_balancing_loss(strided(logits), fraction.to(torch::kFloat32), score),
                         loss));
    }
  }
}

TEST_CASE("load_balancing_loss: 1 when uniform, E when collapsed", "[load_balancing_loss]") {
  const Tensor uniform = torch::full({4}, 0.25, torch::kDouble);
  CHECK(load_balancing_loss(fixture_logits(), uniform, "softmax").item<double>() == near(1));
  CHECK(load_balancing_loss(fixture_logits(), uniform, "sigmoid").item<double>() == near(1));
  const Tensor skewed = torch::tensor({0.7, 0.1, 0.1, 0.1}, torch::kDouble);
  const Tensor flat = torch::zeros({6, 4}, torch::kDouble);
  CHECK(load_balancing_loss(flat, skewed, "softmax").item<double>() == near(1));
  const Tensor certain = torch::tensor({{900., 0., 0., 0.}}, torch::kDouble);
  const Tensor one = torch::tensor({1., 0., 0., 0.}, torch::kDouble);
  CHECK(load_balancing_loss(certain, one, "softmax").item<double>() == near(4));
}

// The last sequence is padding throughout, and the masked mean does not count it.
TEST_CASE("load_balancing_loss: masked tokens and independent sequences", "[load_balancing_loss]") {
  const Tensor logits = wave({2, 3, 6, 4}, 0, 3), fraction = wave({2, 3, 4}, 1).abs();
  Tensor mask = wave({2, 3, 6}, 2).gt(-0.3);
  mask[1][2].fill_(false);
  for (const auto& score : kScoreFunctions) {
    double plain = 0, masked = 0;
    for (int64_t a = 0; a < 2; ++a) {
      for (int64_t b = 0; b < 3; ++b) {
        using torchmoe::reference::load_balancing_loss;
        plain += load_balancing_loss(logits[a][b], fraction[a][b], score) / 6;
        masked += load_balancing_loss(logits[a][b], fraction[a][b], score, mask[a][b]) / 5;
      }
    }
    CHECK(load_balancing_loss(logits, fraction, score).item<double>() == near(plain));
    CHECK(load_balancing_loss(logits, fraction, score, mask).item<double>() == near(masked));
  }
}

TEST_CASE("load_balancing_loss: no counted token gives 0", "[load_balancing_loss]") {
  const Tensor logits = leaf({3, 4}), fraction = torch::full({4}, 0.25, torch::kDouble);
  const Tensor loss =
      load_balancing_loss(logits, fraction, "softmax", torch::zeros({3}, torch::kBool));
  CHECK(loss.item<double>() == 0);
  loss.backward();
  CHECK(torch::equal(logits.grad(), torch::zeros({3, 4}, torch::kDouble)));
  CHECK(load_balancing_loss(torch::empty({0, 4}), fraction, "softmax").item<double>() == 0);
  CHECK(load_balancing_loss(torch::empty({0, 3, 4}), torch::empty({0, 4}), "softmax")
            .item<double>() == 0);
}

TEST_CASE("load_balancing_loss: a row of -inf adds nothing", "[load_balancing_loss]") {
  Tensor logits = wave({2, 4});
  logits[1].fill_(-std::numeric_limits<double>::infinity());
  const Tensor fraction = wave({4}, 1).abs();
  for (const auto& score : kScoreFunctions) {
    const double alone = load_balancing_loss(logits.slice(0, 0, 1), fraction, score).item<double>();
    CHECK(load_balancing_loss(logits, fraction, score).item<double>() == near(alone / 2));
  }
}

TEST_CASE("load_balancing_loss: a masked NaN does not count", "[load_balancing_loss]") {
  Tensor logits = wave({3, 4});
  logits[1].fill_(std::nan(""));
  logits.requires_grad_();
  const Tensor fraction = wave({4}, 1).abs(), mask = torch::tensor({1, 0, 1}).to(torch::kBool);
  const Tensor loss = load_balancing_loss(logits, fraction, "softmax", mask);
  CHECK(std::isfinite(loss.item<double>()));
  loss.backward();
  CHECK(torch::equal(logits.grad()[1], torch::zeros({4}, torch::kDouble)));
  CHECK(std::isnan(load_balancing_loss(logits, fraction, "softmax").item<double>()));
}

TEST_CASE("load_balancing_loss: gradients", "[load_balancing_loss]") {
  const Tensor fraction = wave({4}, 1).abs();
  for (const auto& score : kScoreFunctions) {
    const auto plain = [&](const Tensors& in) {
      return load_balancing_loss(in[0], fraction, score);
    };
    const auto masked = [&](const Tensors& in) {
      return load_balancing_loss(in[0], fraction, score, fixture_mask());
    };
    const auto sequences = [&](const Tensors& in) {
      return load_balancing_loss(in[0], fraction.expand({2, 4}), score);
    };
    CHECK(gradcheck(plain, {fixture_logits().requires_grad_()}).message == "");
    CHECK(gradcheck(masked, {fixture_logits().requires_grad_()}).message == "");
    CHECK(gradcheck(sequences, {leaf({2, 5, 4})}).message == "");
    CHECK(gradgradcheck(plain, {leaf({5, 4})}).message == "");
    CHECK(gradgradcheck(masked, {fixture_logits().requires_grad_()}).message == "");
    CHECK(gradgradcheck(sequences, {leaf({2, 5, 4})}).message == "");
  }
}

TEST_CASE("load_balancing_loss: fraction carries no gradient", "[load_balancing_loss]") {
  const Tensor fraction = leaf({4});
  load_balancing_loss(leaf({3, 4}), fraction, "softmax").backward();
  CHECK_FALSE(fraction.grad().defined());
}

TEST_CASE("load_balancing_loss: errors", "[load_balancing_loss]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor logits = torch::zeros({3, 4}), fraction = torch::zeros({4});
  CHECK_THROWS_WITH(load_balancing_loss(fraction, fraction, "softmax"),
                    contains("load_balancing_loss: logits must be [..., num_tokens, num_experts], "
                             "got shape [4]"));
  CHECK_THROWS_WITH(load_balancing_loss(logits.to(torch::kLong), fraction, "softmax"),
                    contains("load_balancing_loss: logits must be float32"));
  CHECK_THROWS_WITH(
      load_balancing_loss(logits, torch::zeros({3}), "softmax"),
      contains("load_balancing_loss: fraction must be [..., num_experts] = [4], got shape [3]"));
  CHECK_THROWS_WITH(load_balancing_loss(logits, torch::zeros({4}, torch::kLong), "softmax"),
                    contains("load_balancing_loss: fraction must be float32"));
  CHECK_THROWS_AS(load_balancing_loss(logits, fraction, "tanh"), c10::ValueError);
  CHECK_THROWS_WITH(load_balancing_loss(logits, fraction, "tanh"),
                    contains("load_balancing_loss: score_function must be one of \"softmax\", "
                             "\"sigmoid\", got \"tanh\""));
  CHECK_THROWS_WITH(load_balancing_loss(logits, fraction, "softmax", torch::ones({3})),
                    contains("load_balancing_loss: token_mask must be Bool, got Float"));
  CHECK_THROWS_WITH(
      load_balancing_loss(logits, fraction, "softmax", torch::ones({4}, torch::kBool)),
      contains("load_balancing_loss: token_mask must") && contains("got shape [4]"));
}
