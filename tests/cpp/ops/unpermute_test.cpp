#include "ops/unpermute.h"

#include <cmath>

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::dispatch_plan;
using torchmoe::unpermute;

TEST_CASE("unpermute: values", "[unpermute]") {
  for (const auto& [name, indices] : choices()) {
    const auto plan = dispatch_plan(indices, 4);
    for (const auto dtype : kFloatTypes) {
      for (const int64_t hidden : {1, 7, 64}) {
        INFO(name << " " << dtype << " H " << hidden);
        const Tensor rows = wave({indices.numel(), hidden}, 0, 1, dtype);
        for (const auto weight_dtype : {torch::kFloat32, torch::kFloat64, dtype}) {
          const Tensor weights = wave(indices.sizes(), 1, 1, weight_dtype);
          const Tensor y = unpermute(rows, weights, plan);
          CHECK(y.scalar_type() == dtype);
          const Tensor expected = torchmoe::reference::unpermute(rows, weights, plan);
          CHECK(difference(y, expected, indices.size(1)) == "");
          CHECK(torch::equal(unpermute(strided(rows), strided(weights), plan), y));
        }
      }
    }
  }
}

TEST_CASE("unpermute: a slot without a route is not read", "[unpermute]") {
  const auto plan = dispatch_plan(ids({{1, -1}, {9, 0}}), 4);
  Tensor rows = wave({4, 3});
  rows.slice(0, 2).fill_(std::nan(""));
  Tensor weights = torch::tensor({{0.5, std::nan("")}, {std::nan(""), 2.}}, torch::kDouble);
  const Tensor y = unpermute(rows, weights, plan);
  CHECK(torch::equal(y, torch::stack({rows[1] * 0.5, rows[0] * 2})));

  rows.requires_grad_();
  weights.requires_grad_();
  unpermute(rows, weights, plan).sum().backward();
  CHECK(torch::equal(rows.grad().slice(0, 2), torch::zeros({2, 3}, torch::kDouble)));
  CHECK(weights.grad()[0][1].item<double>() == 0);
  CHECK(weights.grad()[1][0].item<double>() == 0);
}

TEST_CASE("unpermute: empty", "[unpermute]") {
  const auto plan = dispatch_plan(torch::empty({0, 2}, torch::kLong), 4);
  CHECK(unpermute(torch::empty({0, 3}), torch::empty({0, 2}), plan).sizes() ==
        at::IntArrayRef{0, 3});
}

TEST_CASE("unpermute: gradients", "[unpermute]") {
  for (const auto& [name, indices] : choices()) {
    INFO(name);
    const auto plan = dispatch_plan(indices, 4);
    const auto function = [plan = plan](const Tensors& in) {
      return unpermute(in[0], in[1], plan);
    };
    const Tensors inputs = {leaf({indices.numel(), 3}), leaf(indices.sizes(), 1)};
    CHECK(gradcheck(function, inputs).message == "");
    CHECK(gradgradcheck(function, inputs).message == "");
  }
}

TEST_CASE("unpermute: errors", "[unpermute]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor rows = torch::zeros({4, 3}), weights = torch::zeros({2, 2});
  const auto plan = dispatch_plan(ids({{0, 1}, {1, 0}}), 2);
  CHECK_THROWS_WITH(unpermute(rows[0], weights, plan),
                    contains("unpermute: rows must be [num_rows, hidden_size], got shape [3]"));
  CHECK_THROWS_WITH(unpermute(rows.slice(0, 1), weights, plan),
                    contains("unpermute: rows must be [") && contains("got shape [3, 3]"));
  CHECK_THROWS_WITH(
      unpermute(rows, torch::zeros({2, 1}), plan),
      contains("unpermute: weights must be [num_tokens, top_k] = [2, 2], got shape [2, 1]"));
  CHECK_THROWS_WITH(unpermute(rows, weights.to(torch::kHalf), plan),
                    contains("unpermute: weights must be float32, float64 or the dtype of rows"));
  CHECK_THROWS_WITH(unpermute(rows.to(torch::kLong), weights, plan),
                    contains("unpermute: rows must be float32"));
}
