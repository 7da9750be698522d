#include "nn/experts.h"

#include <sstream>
#include <string>
#include <vector>

#include "catch2.h"
#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Experts;
using torchmoe::nn::ExpertsOptions;

namespace {

Experts make(const std::string& activation, bool bias) {
  Experts experts(ExpertsOptions(5, 3, 4).activation(activation).bias(bias));
  experts->to(torch::kFloat64);
  return experts;
}

std::optional<Tensor> if_defined(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor.detach()) : std::nullopt;
}

}  // namespace

TEST_CASE("Experts name and shape their parameters as Transformers does", "[nn]") {
  for (const auto& activation : torchmoe::reference::activations()) {
    const bool gated = torchmoe::reference::is_gated(activation);
    for (const bool bias : {false, true}) {
      CAPTURE(activation, bias);
      const auto parameters = make(activation, bias)->named_parameters();
      const std::string name_in = gated ? "gate_up_proj" : "up_proj";
      const int64_t inner = gated ? 6 : 3;
      CHECK(parameters.size() == (bias ? 4 : 2));
      CHECK(parameters[name_in].sizes() == at::IntArrayRef({4, inner, 5}));
      CHECK(parameters["down_proj"].sizes() == at::IntArrayRef({4, 5, 3}));
      if (bias) {
        CHECK(parameters[name_in + "_bias"].sizes() == at::IntArrayRef({4, inner}));
        CHECK(parameters["down_proj_bias"].sizes() == at::IntArrayRef({4, 5}));
      }
    }
  }
}

TEST_CASE("Experts give the weighted sum of their networks", "[nn]") {
  const auto x = wave({5, 5});
  for (const auto& activation : torchmoe::reference::activations()) {
    for (const bool bias : {false, true}) {
      auto experts = make(activation, bias);
      for (const auto& [name, indices] : choices()) {
        CAPTURE(activation, bias, name);
        const auto weights = wave(indices.sizes(), 1);
        const auto expected = torchmoe::reference::expert_mlp(x,
                                                              indices,
                                                              weights,
                                                              experts->w_in.detach(),
                                                              if_defined(experts->b_in),
                                                              experts->w_out.detach(),
                                                              if_defined(experts->b_out),
                                                              activation);
        CHECK(difference(experts(x, indices, weights), expected, 5 + 3 + 2) == "");
      }
    }
  }
}

TEST_CASE("Experts give an idle expert a dense gradient of zeros", "[nn]") {
  auto experts = make("swiglu", true);
  experts(wave({2, 5}), ids({{0, 1}, {1, -1}}), wave({2, 2})).sum().backward();
  for (const auto& parameter : experts->parameters()) {
    CHECK(parameter.grad()[1].abs().max().item<double>() > 0);
    CHECK(torch::equal(parameter.grad()[3], torch::zeros_like(parameter[3])));
  }
}

TEST_CASE("Experts start within 1 / sqrt(fan in)", "[nn]") {
  Experts experts(ExpertsOptions(64, 16, 8).bias(true));
  for (const auto& parameter : experts->named_parameters()) {
    CAPTURE(parameter.key());
    const bool down = parameter.key().rfind("down_proj", 0) == 0;
    const double bound = down ? 0.25 : 0.125;
    CHECK(parameter->abs().max().item<double>() <= bound);
    CHECK(parameter->abs().max().item<double>() > 0.9 * bound);
  }
}

TEST_CASE("Experts clone, print and refuse", "[nn]") {
  auto experts = make("relu", true);
  const auto copy = std::dynamic_pointer_cast<torchmoe::nn::ExpertsImpl>(experts->clone());
  for (const auto& parameter : experts->named_parameters()) {
    CHECK(torch::equal(copy->named_parameters()[parameter.key()], *parameter));
  }
  CHECK_FALSE(copy->w_in.is_same(experts->w_in));
  CHECK(copy->b_out.is_same(copy->named_parameters()["down_proj_bias"]));
  std::ostringstream text;
  text << experts;
  CHECK(text.str() ==
        "torchmoe::nn::Experts(hidden_size=5, intermediate_size=3, num_experts=4, "
        "activation=relu, bias=true)");
  CHECK_THROWS_WITH(Experts(0, 3, 4), contains("Experts: hidden_size must be >= 1, got 0"));
  CHECK_THROWS_WITH(Experts(5, 0, 4), contains("Experts: intermediate_size must be >= 1, got 0"));
  CHECK_THROWS_WITH(Experts(5, 3, -1), contains("Experts: num_experts must be >= 1, got -1"));
  CHECK_THROWS_WITH(make("swish", false), contains("Experts: activation must be one of \"gelu\""));
}
