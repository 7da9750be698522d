#include "ops/grouped_mlp.h"

#include <cmath>
#include <string>

#include "ops/grouped_linear.h"
#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::ExpertParameters;
using torchmoe::grouped_linear;
using torchmoe::grouped_mlp;

namespace {

Tensor offsets(const std::vector<int64_t>& values) {
  return torch::tensor(values, torch::kLong);
}

ExpertParameters parameters(const std::string& activation, at::ScalarType dtype = torch::kDouble) {
  const int64_t pre = torchmoe::reference::is_gated(activation) ? 10 : 5;
  return {wave({4, pre, 3}, 2, 1, dtype),
          wave({4, pre}, 3, 1, dtype),
          wave({4, 3, 5}, 4, 1, dtype),
          wave({4, 3}, 5, 1, dtype)};
}

}  // namespace

TEST_CASE("grouped_mlp: values", "[grouped_mlp]") {
  const Tensor owners = ids({{0}, {0}, {2}, {2}, {2}, {3}, {-1}, {-1}});
  for (const auto& activation : torchmoe::reference::activations()) {
    for (const auto dtype : kFloatTypes) {
      INFO(activation << " " << dtype);
      const auto experts = parameters(activation, dtype);
      const Tensor rows = wave({8, 3}, 0, 1, dtype);
      const Tensor out = grouped_mlp(rows, experts, offsets({0, 2, 2, 5, 6}), activation);
      CHECK(out.scalar_type() == dtype);
      const Tensor expected = torchmoe::reference::expert_mlp(rows,
                                                              owners,
                                                              torch::ones({8, 1}),
                                                              experts.w_in,
                                                              experts.b_in,
                                                              experts.w_out,
                                                              experts.b_out,
                                                              activation);
      CHECK(difference(out, expected, 3 + 5 + 1, /*rounded=*/epsilon(dtype)) == "");
    }
  }
}

TEST_CASE("grouped_mlp: what gated activations do besides", "[grouped_mlp]") {
  // gpt-oss's: (up + 1) * gate * sigmoid(alpha * gate), both bounded, gates and values alternating.
  const auto experts = parameters("swiglu");
  const Tensor rows = wave({7, 3}), split = offsets({0, 3, 3, 5, 7});
  const Tensor pre = grouped_linear(rows, experts.w_in, experts.b_in, split);
  const Tensor gate = pre.slice(1, 0, 10, 2).clamp_max(0.7);
  const Tensor up = pre.slice(1, 1, 10, 2).clamp(-0.7, 0.7);
  const Tensor act = (up + 1) * gate * torch::sigmoid(1.702 * gate);
  const Tensor expected = grouped_linear(act, experts.w_out, experts.b_out, split);
  torchmoe::ExpertActivation activation("swiglu");
  activation.alpha = 1.702;
  activation.limit = 0.7;
  activation.up_offset = 1;
  activation.interleaved = true;
  CHECK(difference(grouped_mlp(rows, experts, split, activation), expected, 10) == "");
  CHECK_THROWS_AS(grouped_mlp(rows, parameters("silu"), split, {"silu", 1.702}), c10::ValueError);
  CHECK_THROWS_WITH(grouped_mlp(rows, experts, split, {"swiglu", -1.0}),
                    contains("grouped_mlp: alpha must be positive and finite, got -1"));
}

TEST_CASE("grouped_mlp: rows past the last offset are not read", "[grouped_mlp]") {
  auto experts = parameters("swiglu");
  Tensor rows = wave({6, 3});
  rows.slice(0, 4).fill_(std::nan(""));
  rows.requires_grad_();
  experts.w_in.requires_grad_();
  const Tensor out = grouped_mlp(rows, experts, offsets({0, 1, 1, 2, 4}), "swiglu");
  CHECK(torch::equal(out.slice(0, 4), torch::zeros({2, 3}, torch::kDouble)));
  out.sum().backward();
  CHECK(torch::equal(rows.grad().slice(0, 4), torch::zeros({2, 3}, torch::kDouble)));
  CHECK(torch::equal(experts.w_in.grad()[1], torch::zeros({10, 3}, torch::kDouble)));
  CHECK(experts.w_in.grad().isfinite().all().item<bool>());
}

TEST_CASE("grouped_mlp: gradients", "[grouped_mlp]") {
  auto experts = parameters("geglu_tanh");
  const Tensor split = offsets({0, 2, 2, 5, 6});
  Tensor rows = wave({6, 3}).requires_grad_();
  for (Tensor* t : {&experts.w_in, &*experts.b_in, &experts.w_out, &*experts.b_out}) {
    t->requires_grad_();
  }
  const auto function = [&](const Tensors& in) {
    return grouped_mlp(in[0], {in[1], in[2], in[3], in[4]}, split, "geglu_tanh");
  };
  const Tensors inputs{rows, experts.w_in, *experts.b_in, experts.w_out, *experts.b_out};
  CHECK(gradcheck(function, inputs).message == "");
  CHECK(gradgradcheck(function, inputs).message == "");
}

TEST_CASE("grouped_mlp: errors", "[grouped_mlp]") {
  const auto experts = parameters("swiglu", torch::kFloat);
  const Tensor rows = wave({6, 3}, 0, 1, torch::kFloat), split = offsets({0, 2, 2, 5, 6});
  CHECK_THROWS_WITH(grouped_mlp(rows[0], experts, split, "swiglu"),
                    contains("grouped_mlp: rows must be [num_rows, hidden_size], got shape [3]"));
  CHECK_THROWS_WITH(grouped_mlp(rows, experts, split.slice(0, 1), "swiglu"),
                    contains("grouped_mlp: expert_offsets must be [num_experts + 1]"));
}
