#include "ops/attach_dense_gradient.h"

#include <string>

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::attach_dense_gradient;

namespace {

struct Layer {
  Tensor y, probs, x, w_in, b_in, w_out, b_out;
};

Layer layer(int64_t tokens,
            bool gated,
            at::ScalarType dtype = torch::kFloat64,
            int64_t experts = 4,
            int64_t hidden = 3,
            int64_t inner = 5) {
  const int64_t pre = gated ? 2 * inner : inner;
  return {
      wave({tokens, hidden}, 0, 1, dtype),
      wave({tokens, experts}, 1, 1, dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32)
          .softmax(-1)
          .requires_grad_(),
      wave({tokens, hidden}, 2, 1, dtype),
      wave({experts, pre, hidden}, 3, 1, dtype),
      wave({experts, pre}, 4, 1, dtype),
      wave({experts, hidden, inner}, 5, 1, dtype),
      wave({experts, hidden}, 6, 1, dtype)};
}

Tensor gradient_of_probs(const Layer& l, const Tensor& grad, bool bias, const std::string& name) {
  const std::optional<Tensor> none;
  const Tensor y = attach_dense_gradient(
      l.y,
      l.probs,
      l.x,
      {l.w_in, bias ? std::optional(l.b_in) : none, l.w_out, bias ? std::optional(l.b_out) : none},
      name);
  return torch::autograd::grad({y}, {l.probs}, {grad})[0];
}

/// <grad, E_i(x)> for every expert, one expert at a time.
Tensor expected(const Layer& l, const Tensor& grad, bool bias, const std::string& name) {
  const int64_t tokens = l.x.size(0);
  const std::optional<Tensor> none;
  std::vector<Tensor> columns;
  for (int64_t i = 0; i < l.w_in.size(0); ++i) {
    const Tensor output = torchmoe::reference::expert_mlp(l.x,
                                                          torch::full({tokens, 1}, i, torch::kLong),
                                                          torch::ones({tokens, 1}, torch::kDouble),
                                                          l.w_in,
                                                          bias ? std::optional(l.b_in) : none,
                                                          l.w_out,
                                                          bias ? std::optional(l.b_out) : none,
                                                          name);
    columns.push_back((output.to(torch::kDouble) * grad.to(torch::kDouble)).sum(1));
  }
  return torch::stack(columns, 1);
}

}  // namespace

TEST_CASE("attach_dense_gradient: a copy of y", "[attach_dense_gradient]") {
  const Layer l = layer(5, true);
  const Tensor y =
      attach_dense_gradient(l.y, l.probs, l.x, {l.w_in, l.b_in, l.w_out, l.b_out}, "swiglu");
  CHECK(torch::equal(y, l.y));
  CHECK(y.data_ptr() != l.y.data_ptr());
}

TEST_CASE("attach_dense_gradient: every expert's score gets its gradient",
          "[attach_dense_gradient]") {
  for (const auto dtype : {torch::kFloat64, torch::kFloat32, torch::kBFloat16}) {
    for (const int64_t tokens : {0, 1, 5, 131, 260}) {
      for (const std::string name : {"swiglu", "gelu"}) {
        for (const bool bias : {true, false}) {
          INFO(dtype << " " << tokens << " " << name << " " << bias);
          const Layer l = layer(tokens, name == "swiglu", dtype);
          const Tensor grad = wave({tokens, 3}, 7, 1, dtype);
          CHECK(difference(gradient_of_probs(l, grad, bias, name),
                           expected(l, grad, bias, name),
                           3 + 5 + 3,
                           /*rounded=*/epsilon(dtype)) == "");
        }
      }
    }
  }
}

TEST_CASE("attach_dense_gradient: y keeps its gradient, nothing else gets one",
          "[attach_dense_gradient]") {
  Layer l = layer(5, true);
  for (Tensor* t : {&l.y, &l.x, &l.w_in, &l.b_in, &l.w_out, &l.b_out}) {
    t->requires_grad_();
  }
  const Tensor grad = wave({5, 3}, 7);
  attach_dense_gradient(l.y, l.probs, l.x, {l.w_in, l.b_in, l.w_out, l.b_out}, "reglu")
      .backward(grad);
  CHECK(torch::equal(l.y.grad(), grad));
  for (const Tensor& t : {l.x, l.w_in, l.b_in, l.w_out, l.b_out}) {
    CHECK(!t.grad().defined());
  }
}

TEST_CASE("attach_dense_gradient: any strides", "[attach_dense_gradient]") {
  const Layer l = layer(7, true);
  const Tensor grad = wave({7, 3}, 7);
  const Layer views{strided(l.y),
                    l.probs,
                    strided(l.x),
                    strided(l.w_in),
                    strided(l.b_in),
                    strided(l.w_out),
                    strided(l.b_out)};
  CHECK(torch::equal(gradient_of_probs(views, strided(grad), true, "swiglu"),
                     gradient_of_probs(l, grad, true, "swiglu")));
}

TEST_CASE("attach_dense_gradient: double backward", "[attach_dense_gradient]") {
  const Layer l = layer(4, true);
  const auto function = [&](const Tensors& in) {
    return attach_dense_gradient(in[0], in[1], l.x, {l.w_in, l.b_in, l.w_out, l.b_out}, "swiglu");
  };
  CHECK(gradgradcheck(function, {leaf({4, 3}, 2), leaf({4, 4}, 7)}).message == "");
}

TEST_CASE("attach_dense_gradient: errors", "[attach_dense_gradient]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Layer l = layer(2, true);
  const auto call = [&](const Layer& a, const char* activation = "swiglu") {
    return attach_dense_gradient(a.y, a.probs, a.x, {a.w_in, a.b_in, a.w_out, a.b_out}, activation);
  };
  const auto with = [&](Tensor Layer::*member, const Tensor& value) {
    Layer changed = l;
    changed.*member = value;
    return call(changed);
  };
  CHECK_NOTHROW(call(l));
  CHECK_THROWS_AS(call(l, "tanh"), c10::ValueError);
  CHECK_THROWS_WITH(call(l, "tanh"), contains("attach_dense_gradient: activation must be one of"));
  CHECK_THROWS_WITH(with(&Layer::y, l.y[0]),
                    contains("attach_dense_gradient: y must be [num_tokens, hidden_size] = [2, 3]"
                             ", got shape [3]"));
  CHECK_THROWS_WITH(with(&Layer::probs, l.probs.slice(1, 1)),
                    contains("attach_dense_gradient: probs must be [num_tokens, num_experts] = "
                             "[2, 4], got shape [2, 3]"));
  CHECK_THROWS_WITH(with(&Layer::probs, l.probs.to(torch::kLong)),
                    contains("attach_dense_gradient: probs must be float32"));
  CHECK_THROWS_WITH(with(&Layer::w_in, l.w_in.to(torch::kFloat)),
                    contains("attach_dense_gradient: w_out must have the dtype of w_in"));
}
