#include "ops/grouped_linear.h"

#include <cmath>

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::grouped_linear;

namespace {

Tensor offsets(const std::vector<int64_t>& values) {
  return torch::tensor(values, torch::kLong);
}

// Ten rows among 4 experts: all, an idle one, rows past the last offset, none, all on one.
std::vector<Tensor> splits() {
  return {offsets({0, 3, 4, 8, 10}),
          offsets({0, 4, 4, 9, 10}),
          offsets({0, 1, 3, 5, 7}),
          offsets({0, 0, 0, 0, 0}),
          offsets({0, 0, 10, 10, 10})};
}

}  // namespace

TEST_CASE("grouped_linear: values", "[grouped_linear]") {
  for (const auto& split : splits()) {
    for (const auto dtype : kFloatTypes) {
      for (const auto& [in, out] :
           std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {7, 5}, {33, 18}}) {
        INFO(split << " " << dtype << " " << in << " to " << out);
        const Tensor rows = wave({10, in}, 0, 1, dtype), weight = wave({4, out, in}, 1, 1, dtype);
        const Tensor bias = wave({4, out}, 2, 1, dtype);
        const Tensor y = grouped_linear(rows, weight, bias, split);
        CHECK(y.scalar_type() == dtype);
        const Tensor expected = torchmoe::reference::grouped_linear(rows, weight, bias, split);
        CHECK(difference(y, expected, in + 1) == "");
        const Tensor bare = grouped_linear(
            strided(rows), weight.transpose(1, 2).contiguous().transpose(1, 2), {}, split);
        CHECK(difference(bare, torchmoe::reference::grouped_linear(rows, weight, {}, split), in) ==
              "");
      }
    }
  }
}

TEST_CASE("grouped_linear: rows past the last offset are not read", "[grouped_linear]") {
  Tensor rows = wave({10, 3}), weight = wave({4, 2, 3}, 1);
  rows.slice(0, 7).fill_(std::nan(""));
  rows.requires_grad_();
  weight.requires_grad_();
  const Tensor y = grouped_linear(rows, weight, {}, offsets({0, 1, 3, 5, 7}));
  CHECK(torch::equal(y.slice(0, 7), torch::zeros({3, 2}, torch::kDouble)));
  y.sum().backward();
  CHECK(torch::equal(rows.grad().slice(0, 7), torch::zeros({3, 3}, torch::kDouble)));
  CHECK(weight.grad().isfinite().all().item<bool>());
}

TEST_CASE("grouped_linear: an idle expert has a dense gradient of zeros", "[grouped_linear]") {
  const Tensor weight = leaf({4, 2, 3}), bias = leaf({4, 2});
  grouped_linear(wave({10, 3}), weight, bias, offsets({0, 4, 4, 9, 10})).sum().backward();
  CHECK(torch::equal(weight.grad()[1], torch::zeros({2, 3}, torch::kDouble)));
  CHECK(torch::equal(bias.grad()[1], torch::zeros({2}, torch::kDouble)));
}

TEST_CASE("grouped_linear: empty", "[grouped_linear]") {
  const Tensor y =
      grouped_linear(torch::empty({0, 3}), torch::ones({2, 5, 3}), {}, offsets({0, 0, 0}));
  CHECK(y.sizes() == at::IntArrayRef{0, 5});
}

TEST_CASE("grouped_linear: gradients", "[grouped_linear]") {
  for (const auto& split : splits()) {
    INFO(split);
    const auto with_bias = [&](const Tensors& in) {
      return grouped_linear(in[0], in[1], in[2], split);
    };
    const auto without = [&](const Tensors& in) { return grouped_linear(in[0], in[1], {}, split); };
    const Tensor rows = leaf({10, 3}), weight = leaf({4, 2, 3}, 1), bias = leaf({4, 2}, 2);
    CHECK(gradcheck(with_bias, {rows, weight, bias}).message == "");
    CHECK(gradcheck(without, {rows, weight}).message == "");
    CHECK(gradgradcheck(with_bias, {rows, weight, bias}).message == "");
  }
}

TEST_CASE("grouped_linear: errors", "[grouped_linear]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor rows = torch::zeros({4, 3}), weight = torch::zeros({2, 5, 3});
  const Tensor split = offsets({0, 2, 4});
  CHECK_THROWS_WITH(
      grouped_linear(rows[0], weight, {}, split),
      contains("grouped_linear: rows must be [num_rows, in_features], got shape [3]"));
  CHECK_THROWS_WITH(grouped_linear(rows.to(torch::kLong), weight, {}, split),
                    contains("grouped_linear: rows must be float32"));
  CHECK_THROWS_WITH(grouped_linear(rows, weight[0], {}, split),
                    contains("grouped_linear: weight must be [") && contains("got shape [5, 3]"));
  CHECK_THROWS_WITH(
      grouped_linear(rows, torch::zeros({2, 5, 4}), {}, split),
      contains("grouped_linear: weight must be [") && contains("got shape [2, 5, 4]"));
  CHECK_THROWS_WITH(grouped_linear(rows, weight.to(torch::kDouble), {}, split),
                    contains("grouped_linear: weight must have the dtype of rows"));
  CHECK_THROWS_WITH(grouped_linear(rows, weight, torch::zeros({2, 3}), split),
                    contains("grouped_linear: bias must be [") && contains("got shape [2, 3]"));
  CHECK_THROWS_WITH(grouped_linear(rows, weight, torch::zeros({2, 5}, torch::kDouble), split),
                    contains("grouped_linear: bias must have the dtype of rows"));
  CHECK_THROWS_WITH(
      grouped_linear(rows, weight, {}, offsets({0, 4})),
      contains("grouped_linear: expert_offsets must be [num_experts + 1] = [3], got shape [2]"));
  CHECK_THROWS_WITH(grouped_linear(rows, weight, {}, split.to(torch::kInt)),
                    contains("grouped_linear: expert_offsets must be Long, got Int"));
}
