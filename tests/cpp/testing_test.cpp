// The gradient check must pass right gradients and name what is wrong with planted ones.
#include "testing.h"

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "catch2.h"

using at::Tensor;
using torchmoe::test::contains;
using torchmoe::testing::gradcheck;
using torchmoe::testing::gradgradcheck;
using torchmoe::testing::Tensors;

namespace {

enum class Mistake {
  none,
  missing_term,
  wrong_sign,
  wrong_scale,
  transposed,
  lost_dependence,
  one_entry,
  not_a_number,
  needs_all,
  stale,
  writes_input,
  writes_input_in_backward,
  writes_gradient,
  counts_calls,
  random_forward,
  no_undefined,
  ignores_strides,
};

Tensor last_x;
int calls = 0;

// y = (x * x) w + x, with x [n, n] and w [n, n], and one mistake in it.
struct Planted : torch::autograd::Function<Planted> {
  static Tensor forward(torch::autograd::AutogradContext* ctx,
                        const Tensor& x,
                        const Tensor& w,
                        Mistake mistake) {
    ctx->save_for_backward({x, w});
    ctx->saved_data["mistake"] = static_cast<int64_t>(mistake);
    if (mistake == Mistake::no_undefined) {
      ctx->set_materialize_grads(false);
    }
    last_x = x.detach().clone();
    const Tensor y = x.square().mm(w) + x;
    if (mistake == Mistake::writes_input) {
      x.detach().add_(1);
    }
    return mistake == Mistake::random_forward ? y + torch::rand_like(y) : y;
  }

  static Tensors backward(torch::autograd::AutogradContext* ctx, const Tensors& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mistake = static_cast<Mistake>(ctx->saved_data["mistake"].toInt());
    const Tensor& x = mistake == Mistake::stale ? last_x : saved[0];
    const Tensor& w = saved[1];
    Tensor g = grads[0];
    if (mistake == Mistake::ignores_strides) {
      g = torch::from_blob(g.data_ptr<double>(), g.sizes(), g.options());
    }
    const double scale = mistake == Mistake::wrong_scale ? 1 : 2;
    Tensor grad_x = scale * x * g.mm(mistake == Mistake::transposed ? w : w.t());
    if (mistake != Mistake::missing_term) {
      grad_x = grad_x + g;
    }
    Tensor grad_w = x.square().t().mm(g);
    switch (mistake) {
      case Mistake::wrong_sign:
        grad_w = -grad_w;
        break;
      case Mistake::lost_dependence:
        grad_w = Tensor();
        break;
      case Mistake::one_entry:
        grad_x[1][2] += 0.01 * g[1][2];
        break;
      case Mistake::not_a_number:
        grad_x[1][2] = std::nan("");
        break;
      case Mistake::needs_all:
        if (!ctx->needs_input_grad(1)) {
          grad_x = torch::zeros_like(grad_x);
        }
        break;
      case Mistake::writes_input_in_backward:
        x.detach().mul_(2);
        break;
      case Mistake::writes_gradient:
        g.mul_(2);
        break;
      case Mistake::counts_calls:
        grad_x = grad_x + 1e-9 * ++calls;
        break;
      default:
        break;
    }
    return {grad_x, grad_w, Tensor()};
  }
};

// Keeps a float intermediate, so that its second derivative misses the way through it.
struct SavesIntermediate : torch::autograd::Function<SavesIntermediate> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x) {
    ctx->save_for_backward({x.cos()});
    return x.sin();
  }
  static Tensors backward(torch::autograd::AutogradContext* ctx, const Tensors& grads) {
    return {grads[0] * ctx->get_saved_variables()[0]};
  }
};

Tensor input(at::IntArrayRef sizes) {
  const auto numel = c10::multiply_integers(sizes);
  const auto values = torch::arange(numel, torch::kFloat64).mul(1.3).add(0.5).sin().view(sizes);
  return values.detach().requires_grad_();
}

torchmoe::testing::GradcheckResult check(Mistake mistake) {
  return gradcheck<Planted>({input({3, 3}), input({3, 3})}, {}, mistake);
}

}  // namespace

TEST_CASE("gradcheck passes right gradients", "[testing]") {
  const Tensor x = input({3, 3}), w = input({3, 3});
  SECTION("of a Function") {
    CHECK(check(Mistake::none).message.empty());
    CHECK(gradgradcheck<Planted>({x, w}, {}, Mistake::none).message.empty());
  }
  SECTION("of a callable that returns a vector, a tuple or integers beside") {
    const auto result = gradcheck(
        [](const auto& in) { return Tensors{in[0].exp(), in[1].argmax(0), in[0].mm(in[1])}; },
        {x, w});
    CHECK(result.message.empty());
    CHECK(gradcheck([](const auto& in) { return torch::max(in[0], 1); }, {x}).ok);
  }
  SECTION("with strided, empty and scalar inputs, and constants beside") {
    const Tensor strided = input({3, 6}).detach().slice(1, 0, 6, 2).requires_grad_();
    const Tensor ids = torch::tensor({2, 0}).expand({4, 2});
    const auto gather = [](const Tensors& in) { return in[0].gather(1, in[1].narrow(0, 0, 3)); };
    CHECK(gradcheck(gather, {strided, ids, Tensor()}).message.empty());
    CHECK(gradcheck([](const auto& in) { return in[0].sin(); }, {input({0, 3})}).ok);
    CHECK(gradcheck([](const auto& in) { return in[0].sin(); }, {input({})}).ok);
  }
  SECTION("and leaves the inputs as they are") {
    const Tensor before = x.detach().clone();
    CHECK(check(Mistake::none).ok);
    CHECK(gradcheck<Planted>({x, w}, {}, Mistake::none).ok);
    CHECK(torch::equal(x, before));
    CHECK_FALSE(x.grad().defined());
  }
}

TEST_CASE("gradcheck skips an output that is meant to have no gradient", "[testing]") {
  const auto with_statistics = [](const Tensors& in) {
    return Tensors{in[0].sin(), in[0].detach().sum()};
  };
  CHECK(gradcheck(with_statistics, {input({4})}).message.empty());
  CHECK_THAT(gradcheck([](const auto& in) { return in[0].detach().sin(); }, {input({4})}).message,
             contains("output 0") && contains("got 0 (analytic)"));
}

TEST_CASE("gradcheck names planted mistakes", "[testing]") {
  const std::vector<std::tuple<const char*, Mistake, std::string>> planted = {
      {"missing term", Mistake::missing_term, "in input 0 at"},
      {"wrong sign", Mistake::wrong_sign, "in input 1 at"},
      {"wrong scale", Mistake::wrong_scale, "in input 0 at"},
      {"transposed", Mistake::transposed, "in input 0 at"},
      {"lost dependence", Mistake::lost_dependence, "got 0 (analytic) with all inputs together"},
      {"one entry", Mistake::one_entry, "output 0 at [1, 2] in input 0 at [1, 2] must be"},
      {"not a number", Mistake::not_a_number, "got nan (analytic)"},
      {"right only when all need a gradient", Mistake::needs_all, "with that input alone"},
      {"stale", Mistake::stale, "in input 0 at"},
      {"forward writes to an input", Mistake::writes_input, "forward must not modify its inputs"},
      {"backward writes to an input",
       Mistake::writes_input_in_backward,
       "backward must not modify its inputs"},
      {"backward writes to the gradient",
       Mistake::writes_gradient,
       "must not write to the gradient"},
      {"another gradient each time", Mistake::counts_calls, "must give the same bits"},
      {"random forward", Mistake::random_forward, "output 0 must be the same in every run"},
      {"undefined gradients", Mistake::no_undefined, "must take an undefined incoming gradient"},
      {"ignores strides", Mistake::ignores_strides, "incoming gradient of any strides"},
  };
  for (const auto& [name, mistake, expected] : planted) {
    INFO(name);
    const auto result = check(mistake);
    CHECK_FALSE(result.ok);
    CHECK_THAT(result.message, contains("gradcheck: ") && contains(expected));
  }
}

TEST_CASE("gradcheck reports both values and how many entries differ", "[testing]") {
  const auto twice = [](const Tensors& in) { return in[0].detach() + in[0]; };
  const auto result = gradcheck(twice, {input({2})});
  CHECK_THAT(result.message,
             contains("(numeric), got 1 (analytic) with all inputs together; 2 of 4 entries"));
}

TEST_CASE("gradcheck names the token whose selection changes", "[testing]") {
  const auto top1 = [](const Tensors& in) { return in[0].argmax(1, /*keepdim=*/true); };
  const auto chosen = [&](const Tensors& in) { return in[0].gather(1, top1(in)); };
  Tensor x = torch::tensor({{0.1, 0.9}, {0.7, 0.2}, {0.4, 0.4}}, torch::kFloat64);
  const auto tie = gradcheck(chosen, {x.clone().requires_grad_()}, {.selection = top1});
  CHECK_THAT(tie.message, contains("token 2 when input 0 at [2, "));
  x[2][0] = 0.5;
  CHECK(gradcheck(chosen, {x.clone().requires_grad_()}, {.selection = top1}).message.empty());
  CHECK(gradgradcheck(chosen, {x.clone().requires_grad_()}, {.selection = top1}).message.empty());
}

TEST_CASE("gradgradcheck finds what a first derivative cannot show", "[testing]") {
  CHECK(gradcheck<SavesIntermediate>({input({3})}).message.empty());
  CHECK_THAT(gradgradcheck<SavesIntermediate>({input({3})}).message,
             contains("gradgradcheck: ") && contains("got 0 (analytic)"));
}

TEST_CASE("gradcheck refuses inputs it cannot differentiate", "[testing]") {
  const auto sine = [](const Tensors& in) { return in[0].sin(); };
  const auto wide = torch::dtype(torch::kFloat64).requires_grad(true);
  CHECK_THROWS_WITH(gradcheck(sine, {torch::ones({2}, torch::requires_grad())}),
                    contains("inputs[0] must be a float64 leaf, got Float"));
  CHECK_THROWS_WITH(gradcheck(sine, {torch::ones({2}, wide) * 2}),
                    contains("must be a float64 leaf, got Double computed from other tensors"));
  CHECK_THROWS_WITH(gradcheck(sine, {torch::ones({2}, torch::kFloat64)}),
                    contains("inputs must hold one that requires grad, got none"));
  const Tensor expanded = torch::ones({1}, torch::kFloat64).expand({3}).requires_grad_();
  CHECK_THROWS_WITH(gradcheck(sine, {expanded}), contains("own memory for every entry"));
  CHECK_THROWS_WITH(gradcheck<Planted>({torch::ones({2, 2}, wide)}, {}, Mistake::none),
                    contains("inputs must be the 2 tensors that forward takes first, got 1"));
  CHECK_THROWS_WITH(gradcheck(sine, {torch::ones({2}, wide)}, {.selection = sine}),
                    contains("selection must return integers, got Double"));
  const auto narrow = [](const Tensors& in) { return in[0].to(torch::kFloat32); };
  CHECK_THAT(gradcheck(narrow, {torch::ones({2}, wide)}).message,
             contains("output 0 must be float64, got Float"));
}
