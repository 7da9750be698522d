#include "ops/expert_mlp.h"

#include <cmath>
#include <string>

#include "ops/grouped_linear.h"
#include "ops/permute.h"
#include "ops/unpermute.h"
#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::expert_mlp;

namespace {

int64_t pre_width(const std::string& activation, int64_t inner) {
  return torchmoe::reference::is_gated(activation) ? 2 * inner : inner;
}

struct Layer {
  Tensor x, weights, w_in, b_in, w_out, b_out;
};

Layer layer(const std::string& activation,
            const Tensor& indices,
            int64_t hidden,
            int64_t inner,
            at::ScalarType dtype = torch::kFloat64,
            int64_t experts = 4) {
  const int64_t pre = pre_width(activation, inner);
  const auto weight_dtype = dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  return {wave({indices.size(0), hidden}, 0, 1, dtype),
          wave(indices.sizes(), 1, 1, weight_dtype),
          wave({experts, pre, hidden}, 2, 1, dtype),
          wave({experts, pre}, 3, 1, dtype),
          wave({experts, hidden, inner}, 4, 1, dtype),
          wave({experts, hidden}, 5, 1, dtype)};
}

}  // namespace

TEST_CASE("expert_mlp: values", "[expert_mlp]") {
  for (const auto& [name, indices] : choices()) {
    for (const auto& activation : torchmoe::reference::activations()) {
      for (const auto dtype : kFloatTypes) {
        INFO(name << " " << activation << " " << dtype);
        const Layer l = layer(activation, indices, 3, 5, dtype);
        const Tensor y =
            expert_mlp(l.x, indices, l.weights, {l.w_in, l.b_in, l.w_out, l.b_out}, activation);
        CHECK(y.scalar_type() == dtype);
        const Tensor expected = torchmoe::reference::expert_mlp(
            l.x, indices, l.weights, l.w_in, l.b_in, l.w_out, l.b_out, activation);
        CHECK(difference(y, expected, 3 + 5 + indices.size(1), /*rounded=*/epsilon(dtype)) == "");
        CHECK(difference(expert_mlp(strided(l.x),
                                    strided(indices),
                                    strided(l.weights),
                                    {strided(l.w_in), {}, strided(l.w_out), {}},
                                    activation),
                         torchmoe::reference::expert_mlp(
                             l.x, indices, l.weights, l.w_in, {}, l.w_out, {}, activation),
                         3 + 5 + indices.size(1),
                         /*rounded=*/epsilon(dtype)) == "");
      }
    }
  }
}

TEST_CASE("expert_mlp: odd sizes", "[expert_mlp]") {
  const Tensor indices = wave({19, 3}).mul(6).round().to(torch::kLong);
  for (const std::string activation : {"gelu", "swiglu"}) {
    for (const auto dtype : {torch::kFloat64, torch::kFloat32, torch::kBFloat16}) {
      INFO(activation << " " << dtype);
      const Layer l = layer(activation, indices, 17, 9, dtype, 5);
      CHECK(difference(
                expert_mlp(l.x, indices, l.weights, {l.w_in, l.b_in, l.w_out, l.b_out}, activation),
                torchmoe::reference::expert_mlp(
                    l.x, indices, l.weights, l.w_in, l.b_in, l.w_out, l.b_out, activation),
                17 + 9 + 3,
                /*rounded=*/epsilon(dtype)) == "");
    }
  }
}

TEST_CASE("expert_mlp: a token without a route gives 0 and reads nothing", "[expert_mlp]") {
  const Tensor indices = ids({{-1, 4}, {1, 0}});
  Layer l = layer("swiglu", indices, 3, 2);
  l.x[0].fill_(std::nan(""));
  l.weights[0].fill_(std::nan(""));
  for (Tensor* t : {&l.x, &l.weights, &l.w_in, &l.w_out}) {
    t->requires_grad_();
  }
  const Tensor y = expert_mlp(l.x, indices, l.weights, {l.w_in, {}, l.w_out, {}}, "swiglu");
  CHECK(torch::equal(y[0], torch::zeros({3}, torch::kDouble)));
  y.sum().backward();
  CHECK(torch::equal(l.x.grad()[0], torch::zeros({3}, torch::kDouble)));
  CHECK(torch::equal(l.weights.grad()[0], torch::zeros({2}, torch::kDouble)));
  for (const Tensor& t : {l.x, l.weights, l.w_in, l.w_out}) {
    CHECK(t.grad().isfinite().all().item<bool>());
  }
  CHECK(torch::equal(l.w_in.grad().slice(0, 2), torch::zeros({2, 4, 3}, torch::kDouble)));
}

TEST_CASE("expert_mlp: NaN and inf stay with their token", "[expert_mlp]") {
  const Tensor indices = choices()[0].indices;
  Layer l = layer("gelu", indices, 3, 2, torch::kFloat32);
  l.x[1][0] = std::nan("");
  const Tensor y = expert_mlp(l.x, indices, l.weights, {l.w_in, {}, l.w_out, {}}, "gelu");
  CHECK(y[1].isnan().all().item<bool>());
  CHECK(torch::cat({y.slice(0, 0, 1), y.slice(0, 2)}).isfinite().all().item<bool>());
}

TEST_CASE("expert_mlp: empty", "[expert_mlp]") {
  const Tensor none = torch::empty({0, 2}, torch::kLong);
  const Layer l = layer("swiglu", none, 3, 2);
  CHECK(expert_mlp(l.x, none, l.weights, {l.w_in, {}, l.w_out, {}}, "swiglu").sizes() ==
        at::IntArrayRef{0, 3});
}

TEST_CASE("expert_mlp: gradients", "[expert_mlp]") {
  for (const auto& [name, indices] : choices()) {
    for (const auto& activation : torchmoe::reference::activations()) {
      INFO(name << " " << activation);
      Layer l = layer(activation, indices, 3, 2);
      for (Tensor* t : {&l.x, &l.weights, &l.w_in, &l.b_in, &l.w_out, &l.b_out}) {
        t->requires_grad_();
      }
      const auto with_bias = [&, indices = indices](const Tensors& in) {
        return expert_mlp(in[0], indices, in[1], {in[2], in[3], in[4], in[5]}, activation);
      };
      const auto without = [&, indices = indices](const Tensors& in) {
        return expert_mlp(in[0], indices, in[1], {in[2], {}, in[3], {}}, activation);
      };
      CHECK(gradcheck(with_bias, {l.x, l.weights, l.w_in, l.b_in, l.w_out, l.b_out}).message == "");
      CHECK(gradcheck(without, {l.x, l.weights, l.w_in, l.w_out}).message == "");
    }
  }
}

TEST_CASE("expert_mlp: gradients with one bias only", "[expert_mlp]") {
  const Tensor indices = choices()[1].indices;
  Layer l = layer("swiglu", indices, 3, 2);
  for (Tensor* t : {&l.x, &l.weights, &l.w_in, &l.b_in, &l.w_out, &l.b_out}) {
    t->requires_grad_();
  }
  const auto inner = [&](const Tensors& in) {
    return expert_mlp(in[0], indices, in[1], {in[2], in[4], in[3], {}}, "swiglu");
  };
  const auto outer = [&](const Tensors& in) {
    return expert_mlp(in[0], indices, in[1], {in[2], {}, in[3], in[4]}, "swiglu");
  };
  CHECK(gradcheck(inner, {l.x, l.weights, l.w_in, l.w_out, l.b_in}).message == "");
  CHECK(gradcheck(outer, {l.x, l.weights, l.w_in, l.w_out, l.b_out}).message == "");
}

TEST_CASE("expert_mlp: the same as permute, grouped_linear and unpermute", "[expert_mlp]") {
  const Tensor indices = choices()[2].indices;
  Layer l = layer("silu", indices, 3, 5);
  const auto plan = torchmoe::dispatch_plan(indices, 4);
  const Tensor rows = torchmoe::permute(l.x, plan);
  const Tensor inner =
      torch::silu(torchmoe::grouped_linear(rows, l.w_in, l.b_in, plan.expert_offsets));
  const Tensor y = torchmoe::unpermute(
      torchmoe::grouped_linear(inner, l.w_out, l.b_out, plan.expert_offsets), l.weights, plan);
  CHECK(difference(expert_mlp(l.x, indices, l.weights, {l.w_in, l.b_in, l.w_out, l.b_out}, "silu"),
                   y,
                   3 + 5 + 2) == "");
}

TEST_CASE("expert_mlp: in two calls, added up wide and rounded once", "[expert_mlp]") {
  // Each slot is a token of one choice; the slots of the experts that are left out give 0.
  const Tensor indices = wave({300, 3}).mul(6).round().to(torch::kLong);
  for (const auto dtype : kFloatTypes) {
    INFO(dtype);
    const Layer l = layer("swiglu", indices, 40, 24, dtype);
    const torchmoe::ExpertParameters experts{l.w_in, l.b_in, l.w_out, l.b_out};
    const Tensor slots = indices.reshape({-1, 1});
    const Tensor x = l.x.repeat_interleave(3, 0);
    const auto wide = dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
    const Tensor ones = torch::ones(slots.sizes(), wide);
    Tensor rows = torch::zeros({slots.size(0), 40}, wide);
    Tensor grad_rows = rows.clone();
    const Tensor grad = wave(l.x.sizes(), 6, 1, dtype);
    for (const bool first : {true, false}) {
      const auto plan = torchmoe::dispatch_plan(slots.masked_fill(slots.lt(2).ne(first), -1), 4);
      const auto [y, pre] = torchmoe::expert_mlp_forward(
          x, ones, experts, plan, /*save_pre=*/true, "swiglu", /*wide=*/true);
      CHECK(y.scalar_type() == wide);
      rows += y;
      grad_rows +=
          std::get<0>(torchmoe::expert_mlp_backward(grad.repeat_interleave(3, 0),
                                                    x,
                                                    l.weights.reshape({-1, 1}),
                                                    experts,
                                                    plan,
                                                    pre,
                                                    {true, false, false, false, false, false},
                                                    "swiglu",
                                                    /*wide=*/true));
    }
    const auto plan = torchmoe::dispatch_plan(indices, 4);
    const auto in_slot_order = torchmoe::dispatch_plan(torch::zeros_like(indices), 1);
    const auto add = [&](const Tensor& of_slots, const Tensor& weights) {
      return torchmoe::unpermute(of_slots, weights, in_slot_order).to(dtype);
    };
    const auto [y, pre] =
        torchmoe::expert_mlp_forward(l.x, l.weights, experts, plan, /*save_pre=*/true, "swiglu");
    CHECK(torch::equal(add(rows, l.weights.to(wide)), y));
    const auto whole = torchmoe::expert_mlp_backward(grad,
                                                     l.x,
                                                     l.weights,
                                                     experts,
                                                     plan,
                                                     pre,
                                                     {true, false, false, false, false, false},
                                                     "swiglu");
    CHECK(torch::equal(add(grad_rows, torch::ones_like(l.weights).to(wide)), std::get<0>(whole)));
  }
}

TEST_CASE("expert_mlp: gradients keep their input's type", "[expert_mlp]") {
  const Tensor indices = choices()[0].indices;
  Layer l = layer("swiglu", indices, 3, 2, torch::kBFloat16);
  for (Tensor* t : {&l.x, &l.weights, &l.w_in, &l.b_in, &l.w_out, &l.b_out}) {
    t->requires_grad_();
  }
  expert_mlp(l.x, indices, l.weights, {l.w_in, l.b_in, l.w_out, l.b_out}, "swiglu")
      .sum()
      .backward();
  for (const Tensor& t : {l.x, l.weights, l.w_in, l.b_in, l.w_out, l.b_out}) {
    CHECK(t.grad().scalar_type() == t.scalar_type());
    CHECK(t.grad().sizes() == t.sizes());
  }
}

TEST_CASE("expert_mlp: double backward", "[expert_mlp]") {
  for (const std::string activation : {"gelu_tanh", "swiglu"}) {
    const Tensor indices = choices()[0].indices;
    Layer l = layer(activation, indices, 3, 2);
    for (Tensor* t : {&l.x, &l.weights, &l.w_in, &l.b_in, &l.w_out, &l.b_out}) {
      t->requires_grad_();
    }
    const auto function = [&](const Tensors& in) {
      return expert_mlp(in[0], indices, in[1], {in[2], in[3], in[4], in[5]}, activation);
    };
    CHECK(gradgradcheck(function, {l.x, l.weights, l.w_in, l.b_in, l.w_out, l.b_out}).message ==
          "");
  }
}

TEST_CASE("expert_mlp: errors", "[expert_mlp]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor indices = ids({{0, 1}, {1, 2}});
  const Layer l = layer("swiglu", indices, 3, 2, torch::kFloat32);
  const auto call = [&](const Layer& a, const Tensor& i, const char* activation = "swiglu") {
    return expert_mlp(a.x, i, a.weights, {a.w_in, a.b_in, a.w_out, a.b_out}, activation);
  };
  const auto with = [&](Tensor Layer::*member, const Tensor& value) {
    Layer changed = l;
    changed.*member = value;
    return call(changed, indices);
  };
  CHECK_NOTHROW(call(l, indices));
  CHECK_THROWS_AS(call(l, indices, "tanh"), c10::ValueError);
  CHECK_THROWS_WITH(call(l, indices, "tanh"),
                    contains("expert_mlp: activation must be one of") && contains("got \"tanh\""));
  CHECK_THROWS_WITH(with(&Layer::x, l.x[0]),
                    contains("expert_mlp: x must be [num_tokens, hidden_size], got shape [3]"));
  CHECK_THROWS_WITH(with(&Layer::x, indices), contains("expert_mlp: x must be float32"));
  CHECK_THROWS_WITH(call(l, indices[0]),
                    contains("expert_mlp: indices must be [num_tokens, top_k], got shape [2]"));
  CHECK_THROWS_WITH(call(l, indices.to(torch::kInt)),
                    contains("expert_mlp: indices must be Long, got Int"));
  CHECK_THROWS_WITH(
      with(&Layer::weights, torch::zeros({2, 1})),
      contains("expert_mlp: weights must be [num_tokens, top_k] = [2, 2], got shape"));
  CHECK_THROWS_WITH(with(&Layer::weights, l.weights.to(torch::kHalf)),
                    contains("expert_mlp: weights must be float32, float64 or the dtype of x"));
  CHECK_THROWS_WITH(call(l, indices, "gelu"),
                    contains("expert_mlp: w_in must be [num_experts, intermediate_size, ") &&
                        contains("got shape [4, 4, 3]"));
  CHECK_THROWS_WITH(with(&Layer::w_in, torch::zeros({4, 2, 3})),
                    contains("expert_mlp: w_in must be [num_experts, 2 * intermediate_size, ") &&
                        contains("got shape [4, 2, 3]"));
  CHECK_THROWS_WITH(with(&Layer::w_in, l.w_in.to(torch::kDouble)),
                    contains("expert_mlp: w_out must have the dtype of w_in"));
  CHECK_THROWS_WITH(with(&Layer::b_in, torch::zeros({4, 3})),
                    contains("expert_mlp: b_in must be [") && contains("got shape [4, 3]"));
  CHECK_THROWS_WITH(with(&Layer::b_in, l.b_in.to(torch::kDouble)),
                    contains("expert_mlp: b_in must have the dtype of w_in"));
  CHECK_THROWS_WITH(with(&Layer::w_out, torch::zeros({4, 2})),
                    contains("expert_mlp: w_out must be [") && contains("got shape [4, 2]"));
  CHECK_THROWS_WITH(with(&Layer::w_out, torch::zeros({4, 5, 2})),
                    contains("expert_mlp: w_out must be [") && contains("got shape [4, 5, 2]"));
  CHECK_THROWS_WITH(with(&Layer::b_out, torch::zeros({4, 2})),
                    contains("expert_mlp: b_out must be [") && contains("got shape [4, 2]"));
  CHECK_THROWS_WITH(with(&Layer::b_out, l.b_out.to(torch::kDouble)),
                    contains("expert_mlp: b_out must have the dtype of w_in"));
}
