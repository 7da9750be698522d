// A certificate must hold for a right layer and name the law that a planted mistake breaks.
#include <string>
#include <vector>

#include "catch2.h"
#include "support.h"
#include "testing.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::testing::Certificate;
using torchmoe::testing::certify;
using torchmoe::testing::Layer;
using torchmoe::testing::Tensors;

namespace {

enum class Mistake {
  none,
  half_of_dx,
  ignores_strides,
  lost_router,
  wrong_for_one_token,
  masks_by_a_product,
  masks_the_output_alone,
  gradient_over_tokens,
  centres_over_tokens,
  shifted_bias,
  wrong_second_derivative,
  refuses_second_derivative,
  throws,
};

// x W^T, with a mistake in its backward pass.
struct Planted : torch::autograd::Function<Planted> {
  static Tensor forward(torch::autograd::AutogradContext* ctx,
                        const Tensor& x,
                        const Tensor& weight,
                        Mistake mistake) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["mistake"] = static_cast<int64_t>(mistake);
    return x.mm(weight.t());
  }
  static Tensors backward(torch::autograd::AutogradContext* ctx, const Tensors& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mistake = static_cast<Mistake>(ctx->saved_data["mistake"].toInt());
    Tensor weight = saved[1], grad = grads[0];
    TORCH_CHECK(mistake != Mistake::refuses_second_derivative || !torch::GradMode::is_enabled(),
                "no double backward");
    if (mistake == Mistake::ignores_strides && grad.numel() > 0) {
      grad = torch::from_blob(grad.data_ptr<double>(), grad.sizes(), grad.options());
    }
    if (mistake == Mistake::wrong_second_derivative) {
      weight = weight.detach();
    }
    Tensor dx = grad.mm(weight);
    if (mistake == Mistake::half_of_dx) {
      dx = dx / 2;
    }
    return {dx, grad.t().mm(saved[0]), Tensor()};
  }
};

// Two of the experts of a token, weighted with their probabilities: y = sum_i p_i (W_i x + b_i).
struct Small {
  Mistake mistake = Mistake::none;
  Tensor router = leaf({4, 3}, 1), weight = leaf({4, 3, 3}, 2), bias = leaf({4, 3}, 3);

  static Tensor leaf(at::IntArrayRef sizes, double phase) {
    return wave(sizes, phase, 1, torch::kFloat64).detach().requires_grad_();
  }

  Tensor chosen(const Tensor& x) const { return std::get<1>(x.mm(router.t()).topk(2, 1)); }

  Tensors forward(const Tensor& given, const Tensor& mask) const {
    TORCH_CHECK(mistake != Mistake::throws, "out of order");
    Tensor x = given;
    if (mask.defined()) {
      const auto counts = mask.unsqueeze(1);
      x = mistake == Mistake::masks_by_a_product ? x * counts : x.masked_fill(~counts, 0);
      x = mistake == Mistake::masks_the_output_alone ? given : x;
    }
    if (mistake == Mistake::gradient_over_tokens) {
      x = x / x.size(0) + (x - x / x.size(0)).detach();
    }
    auto probs = x.mm(router.t()).softmax(1);
    if (mistake == Mistake::lost_router) {
      probs = probs.detach();
    }
    const auto ids = chosen(x);
    Tensor y = torch::zeros_like(x);
    for (int64_t i = 0; i < 4; ++i) {
      const auto routed = (ids == i).any(1).nonzero().squeeze(1);
      const auto out = Planted::apply(x.index_select(0, routed), weight[i], mistake) +
                       bias[mistake == Mistake::shifted_bias ? (i + 1) % 4 : i];
      const auto weighted = probs.index({routed, i}).unsqueeze(1) * out;
      y = y.index_add(0, routed, weighted);
    }
    if (mistake == Mistake::wrong_for_one_token && x.size(0) == 1) {
      y = y.detach() + 0 * y;
    }
    if (mistake == Mistake::ignores_strides) {
      y = Planted::apply(y, torch::eye(3, x.options()), mistake);
    }
    if (mistake == Mistake::centres_over_tokens) {
      y = y - y.mean(0, true);
    }
    Tensor loss = probs.mean(0).square().sum();
    if (mask.defined()) {
      const auto counts = mask.unsqueeze(1);
      const auto shares = probs.masked_fill(~counts, 0).sum(0) / mask.sum();
      loss = shares.square().sum();
      y = y.masked_fill(~counts, 0);
    }
    return {y, loss};
  }

  Layer layer() const {
    return {.forward = [*this](const Tensor& x, const Tensor& mask) { return forward(x, mask); },
            .parameters = {{"router", router}, {"weight", weight}, {"bias", bias}},
            .selection = [*this](const Tensor& x) { return chosen(x); },
            .by_expert = {"router", "weight", "bias"}};
  }
};

Tensor tokens() {
  return wave({9, 3}, 0.3, 1, torch::kFloat64);
}

std::vector<std::string> broken(const Certificate& certificate) {
  std::vector<std::string> names;
  for (const auto& finding : certificate.failures) {
    names.push_back(finding.law);
  }
  return names;
}

Certificate certificate_of(Mistake mistake) {
  return certify(Small{mistake}.layer(), tokens());
}

}  // namespace

TEST_CASE("certify passes a right layer", "[testing]") {
  const auto certificate = certificate_of(Mistake::none);
  INFO(certificate.to_string());
  CHECK(certificate);
  CHECK(certificate.held.size() == 7);
  CHECK(certificate.not_asked.empty());
  CHECK(certificate_of(Mistake::refuses_second_derivative));
}

TEST_CASE("certify names the law that does not hold", "[testing]") {
  using Laws = std::vector<std::string>;
  const auto broken_by = [](Mistake mistake) { return broken(certificate_of(mistake)); };
  CHECK(broken_by(Mistake::half_of_dx) == Laws{"gradients", "one token", "second derivatives"});
  CHECK(broken_by(Mistake::ignores_strides).front() == "gradients");
  CHECK(broken_by(Mistake::lost_router) == Laws{"gradients", "one token", "second derivatives"});
  CHECK(broken_by(Mistake::wrong_for_one_token) == Laws{"one token", "accumulation"});
  CHECK(broken_by(Mistake::masks_by_a_product) == Laws{"tokens that do not count"});
  CHECK(broken_by(Mistake::masks_the_output_alone) == Laws{"tokens that do not count"});
  CHECK(broken_by(Mistake::gradient_over_tokens) ==
        Laws{"gradients", "accumulation", "second derivatives"});
  CHECK(broken_by(Mistake::centres_over_tokens) ==
        Laws{"tokens that do not count", "accumulation", "tokens"});
  CHECK(broken_by(Mistake::shifted_bias) == Laws{"experts"});
  CHECK(broken_by(Mistake::wrong_second_derivative) == Laws{"second derivatives"});
  CHECK(broken_by(Mistake::throws).size() == 7);
}

TEST_CASE("a finding has the fewest tokens, both values and what it usually means", "[testing]") {
  const auto finding = certificate_of(Mistake::gradient_over_tokens).failures.front();
  CHECK(finding.num_tokens == 2);
  CHECK_THAT(finding.message, contains("the gradient of x at [") && contains("must be"));
  CHECK_FALSE(finding.usually.empty());
  const auto text = certificate_of(Mistake::shifted_bias).to_string();
  CHECK_THAT(text, contains("FAILS      experts") && contains("holds      gradients"));
  CHECK_THAT(certificate_of(Mistake::throws).to_string(), contains("out of order"));
}

TEST_CASE("certify asks only what a layer can answer", "[testing]") {
  auto layer = Small{}.layer();
  layer.by_expert.clear();
  layer.takes_mask = false;
  layer.decides_per_token = false;
  const auto certificate = certify(layer, tokens());
  CHECK(certificate);
  CHECK(certificate.not_asked.size() == 3);
  CHECK_THAT(certificate.to_string(), contains("not asked  experts: by_expert names no parameter"));
}

TEST_CASE("certify leaves the parameters as they were", "[testing]") {
  for (const auto mistake : {Mistake::none, Mistake::shifted_bias, Mistake::throws}) {
    const Small small{mistake};
    const auto before = small.weight.detach().clone();
    certify(small.layer(), tokens());
    CHECK(torch::equal(small.weight, before));
    CHECK_FALSE(small.weight.grad().defined());
  }
}

TEST_CASE("certify refuses what it cannot check", "[testing]") {
  auto layer = Small{}.layer();
  CHECK_THROWS_WITH(certify(layer, tokens().to(torch::kFloat32)),
                    contains("certify: x must be float64 of shape [num_tokens, hidden_size], got"));
  layer.by_expert = {"wieght"};
  CHECK_THROWS_WITH(certify(layer, tokens()),
                    contains("certify: by_expert must name parameters, got wieght"));
  layer.parameters[0].second = torch::zeros({4, 3});
  CHECK_THROWS_WITH(certify(layer, tokens()),
                    contains("certify: parameters must be float64 leaves, got Float for router"));
}
