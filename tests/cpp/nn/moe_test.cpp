#include "nn/moe.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>

#include "catch2.h"
#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Balance;
using torchmoe::nn::Capacity;
using torchmoe::nn::ExpertsImpl;
using torchmoe::nn::Gate;
using torchmoe::nn::MoE;
using torchmoe::nn::MoEOptions;
using torchmoe::nn::RouterImpl;
using torchmoe::nn::RouterOptions;

namespace {

constexpr int64_t kTokens = 12, kHidden = 6, kInner = 5, kExperts = 4, kTopK = 2;

MoEOptions sizes(int64_t top_k = kTopK) {
  return {kHidden, kInner, kExperts, top_k};
}

// Parameters of a size that sets experts and tokens apart, in float64.
MoE make(const MoEOptions& options) {
  MoE moe(options);
  moe->to(torch::kFloat64);
  torch::NoGradGuard no_grad;
  double phase = 0;
  for (auto& parameter : moe->parameters()) {
    parameter.copy_(wave(parameter.sizes(), phase += 1));
  }
  return moe;
}

// A loss sums over tokens and experts what sums over hidden_size formed.
bool near(const Tensor& loss, double expected) {
  const double eps = std::numeric_limits<double>::epsilon();
  const double terms = kTokens * kExperts + kHidden;
  return std::abs(loss.item<double>() - expected) <=
         kToleranceFactor * terms * eps * std::max(1.0, std::abs(expected));
}

Tensor mask_of(std::initializer_list<bool> counted) {
  std::vector<int64_t> values(counted.begin(), counted.end());
  return torch::tensor(values).to(torch::kBool);
}

}  // namespace

TEST_CASE("MoE weighs rerouted slots as what they are now", "[nn]") {
  const auto x = wave({kTokens, kHidden});
  for (const std::string overflow : {"next_best", "backup"}) {
    CAPTURE(overflow);
    auto capacity = Capacity(0.7).overflow(overflow);  // 5 places of 4 experts, 24 slots
    if (overflow == "backup") {
      capacity.backup({1, 2, 3, 0});
    }
    auto moe = make(sizes().capacity(capacity));
    torch::NoGradGuard no_grad;
    const auto routing = moe(x + 1).routing;  // all tokens alike, so that some experts are crowded
    const auto kept = routing.indices.ge(0);
    CHECK((kept & routing.indices.ne(routing.selected)).any().item<bool>());
    CHECK(kept.logical_not().any().item<bool>());
    const auto weighed = torch::where(kept, routing.indices, routing.selected);
    const auto expected =
        torchmoe::reference::gate_weights(routing.logits, weighed, "softmax", "topk");
    CHECK(difference(routing.weights, expected, kExperts) == "");
  }
}

TEST_CASE("MoE composes the formulas of its steps", "[nn]") {
  namespace reference = torchmoe::reference;
  const auto x = wave({kTokens, kHidden});
  for (const std::string score_function : {"softmax", "sigmoid"}) {
    for (const std::string normalize : {"none", "topk"}) {
      CAPTURE(score_function, normalize);
      auto moe = make(sizes()
                          .gate(Gate().score_function(score_function).normalize(normalize))
                          .balance(Balance(0.5).z_loss_weight(0.25)));
      torch::NoGradGuard no_grad;
      const auto [hidden_states, aux_loss, routing] = moe(x);
      const auto logits = reference::router_logits(x, moe->router().as<RouterImpl>()->weight);
      const auto indices = reference::select_experts(logits, kTopK);
      const auto weights = reference::gate_weights(logits, indices, score_function, normalize);
      const auto y = reference::expert_mlp(x,
                                           indices,
                                           weights,
                                           moe->experts().as<ExpertsImpl>()->w_in,
                                           std::nullopt,
                                           moe->experts().as<ExpertsImpl>()->w_out,
                                           std::nullopt,
                                           "swiglu");
      const auto counts = torch::bincount(indices.flatten(), {}, kExperts);
      const double balance = reference::load_balancing_loss(
          logits, counts.to(torch::kFloat64) / (kTokens * kTopK), score_function);
      const double z_loss = reference::router_z_loss(logits);

      CHECK(difference(routing.logits, logits, kHidden) == "");
      CHECK(torch::equal(routing.selected, indices));
      CHECK(torch::equal(routing.indices, indices));
      CHECK(difference(routing.weights, weights, kHidden + kExperts) == "");
      CHECK(difference(hidden_states, y, kHidden + kInner + kTopK + kExperts) == "");
      CHECK(torch::equal(routing.tokens_per_expert, counts));
      CHECK(torch::equal(routing.kept_per_expert, counts));
      CHECK(near(routing.losses.at("load_balancing_loss"), balance));
      CHECK(near(routing.losses.at("router_z_loss"), z_loss));
      CHECK(near(aux_loss, 0.5 * balance + 0.25 * z_loss));
    }
  }
}

TEST_CASE("MoE normalises over the chosen experts when there are several", "[nn]") {
  CHECK(MoE(sizes(2))->estimator().normalize() == "topk");
  CHECK(MoE(sizes(1))->estimator().normalize() == "none");
}

TEST_CASE("MoE computes the z-loss only when it is weighted", "[nn]") {
  const auto output = make(sizes())(wave({kTokens, kHidden}));
  CHECK(output.routing.losses.size() == 1);
  CHECK(torch::equal(output.aux_loss, 0.01 * output.routing.losses.at("load_balancing_loss")));
}

TEST_CASE("MoE keeps leading dimensions", "[nn]") {
  auto moe = make(sizes());
  const auto x = wave({kTokens, kHidden});
  const auto flat = moe(x).hidden_states;
  CHECK(torch::equal(moe(x.view({3, 2, 2, kHidden})).hidden_states, flat.view({3, 2, 2, kHidden})));
  CHECK(torch::equal(moe(x[0]).hidden_states, moe(x.slice(0, 0, 1)).hidden_states[0]));
  CHECK(torch::equal(moe(strided(x)).hidden_states, flat));
  CHECK(moe(x.slice(0, 0, 0).view({0, 7, kHidden})).hidden_states.sizes() ==
        at::IntArrayRef({0, 7, kHidden}));
}

TEST_CASE("a masked token has no part in anything", "[nn]") {
  auto moe = make(sizes().capacity(Capacity(1.0)).balance(Balance().z_loss_weight(0.1)));
  const auto mask = mask_of({true, false, true, true, false, true});
  auto x = wave({6, kHidden});
  x.index_put_({mask.logical_not()}, std::nan(""));
  const auto with_gradients = [&](const Tensor& input, const Tensor& token_mask) {
    moe->zero_grad();
    auto output = moe(input, token_mask);
    (output.hidden_states.sum() + output.aux_loss).backward();
    return output;
  };
  const auto alone = with_gradients(x.index({mask}), Tensor());
  std::vector<Tensor> expected;
  for (const auto& parameter : moe->parameters()) {
    expected.push_back(parameter.grad().clone());
  }
  const auto x_leaf = x.clone().requires_grad_();
  const auto output = with_gradients(x_leaf.view({2, 3, kHidden}), mask.view({2, 3}));

  CHECK(difference(output.hidden_states.view({6, kHidden}).index({mask}).detach(),
                   alone.hidden_states.detach(),
                   kHidden + kInner) == "");
  const auto masked = mask.logical_not();
  CHECK(output.hidden_states.view({6, kHidden}).index({masked}).eq(0).all().item<bool>());
  CHECK(x_leaf.grad().index({masked}).eq(0).all().item<bool>());
  CHECK(output.routing.indices.index({masked}).eq(-1).all().item<bool>());
  CHECK(torch::equal(*output.routing.token_mask, mask));
  CHECK(torch::equal(output.routing.tokens_per_expert, alone.routing.tokens_per_expert));
  CHECK(torch::equal(output.routing.kept_per_expert, alone.routing.kept_per_expert));
  CHECK(near(output.aux_loss, alone.aux_loss.item<double>()));
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(difference(moe->parameters()[i].grad(), expected[i], 6 * kHidden * kInner) == "");
  }

  const auto none = with_gradients(x, torch::zeros({6}, torch::kBool));
  CHECK(none.hidden_states.eq(0).all().item<bool>());
  CHECK(none.aux_loss.item<double>() == 0);
}

TEST_CASE("MoE limits what an expert takes", "[nn]") {
  const auto x = wave({kTokens, kHidden});
  for (const std::string order : {"choice", "token"}) {
    CAPTURE(order);
    auto moe = make(sizes().capacity(Capacity(0.5).eval_factor(1.1).order(order)));
    const auto training = moe(x).routing;
    const std::vector<int64_t> room(kExperts, 3);
    CHECK(torch::equal(training.indices,
                       torchmoe::reference::limit_capacity(training.selected, room, order)));
    CHECK(torch::equal(training.kept_per_expert, training.tokens_per_expert.clamp_max(3)));
    moe->eval();
    CHECK(torch::equal(moe(x).routing.kept_per_expert, training.tokens_per_expert.clamp_max(7)));
  }
  auto moe = make(sizes().capacity(Capacity(0.5).minimum(5)));
  const auto routing = moe(x).routing;
  CHECK(torch::equal(routing.kept_per_expert, routing.tokens_per_expert.clamp_max(5)));
}

TEST_CASE("weights are formed before or after slots are dropped", "[nn]") {
  const auto x = wave({kTokens, kHidden});
  const auto run = [&](const std::string& normalize) {
    return make(sizes().capacity(Capacity(0.5).normalize(normalize)))(x).routing;
  };
  const auto before = run("before_drop");
  const auto after = run("after_drop");
  const auto kept = after.indices.ge(0);
  CHECK(kept.logical_not().any().item<bool>());
  CHECK(difference(before.weights.sum(1).detach(), torch::ones({kTokens}, torch::kFloat64), 4) ==
        "");
  CHECK(difference(after.weights.sum(1).detach(), kept.any(1).to(torch::kFloat64), 4) == "");
}

TEST_CASE("MoE has the gradients of its formula", "[nn]") {
  for (const std::string activation : {"swiglu", "gelu"}) {
    CAPTURE(activation);
    MoE moe(MoEOptions(3, 2, 3, 2)
                .activation(activation)
                .bias(true)
                .router(RouterOptions(3, 3).bias(true))
                .capacity(Capacity(1.0))
                .balance(Balance(0.7).z_loss_weight(0.3)));
    moe->to(torch::kFloat64);
    std::vector<Tensor> inputs = {leaf({5, 3})};
    double phase = 0;
    for (const auto& parameter : moe->parameters()) {
      inputs.push_back(leaf(parameter.sizes(), phase += 1));
    }
    const auto output = [&](const Tensors& in) {
      auto& experts = *moe->experts().as<ExpertsImpl>();
      std::vector<Tensor*> parameters = {&moe->router().as<RouterImpl>()->weight,
                                         &moe->router().as<RouterImpl>()->bias,
                                         &experts.w_in,
                                         &experts.b_in,
                                         &experts.w_out,
                                         &experts.b_out};
      for (size_t i = 0; i < parameters.size(); ++i) {
        *parameters[i] = in.at(i + 1);
      }
      return moe(in[0]);
    };
    torchmoe::testing::GradcheckOptions options;
    options.selection = [&](const Tensors& in) { return output(in).routing.indices; };
    const auto result = gradcheck(
        [&](const Tensors& in) -> Tensors {
          const auto [hidden_states, aux_loss, routing] = output(in);
          return {hidden_states, aux_loss};
        },
        inputs,
        options);
    CHECK(result.message == "");
  }
}

TEST_CASE("one expert per token needs another weight or estimator than exact topk", "[nn]") {
  const auto x = wave({kTokens, kHidden});
  auto exact = make(sizes(1).gate(Gate().normalize("topk")));
  CHECK_THROWS_WITH(exact(x), contains("gate_weights: estimator must be \"straight_through\""));
  auto through = make(sizes(1).gate(Gate().normalize("topk").estimator("straight_through")));
  through(x).hidden_states.sum().backward();
  CHECK(through->router().as<RouterImpl>()->weight.grad().abs().max().item<double>() > 0);
}

TEST_CASE("MoE gives the same bits for any number of threads", "[nn]") {
  MoE moe(MoEOptions(64, 48, 8, 2).bias(true).balance(Balance().z_loss_weight(0.1)));
  const auto x = torch::randn({300, 64});
  const auto run = [&](int threads) {
    at::set_num_threads(threads);
    moe->zero_grad();
    auto input = x.clone().requires_grad_();
    const auto output = moe(input);
    (output.hidden_states.square().sum() + output.aux_loss).backward();
    std::vector<Tensor> all = {output.hidden_states, output.aux_loss, input.grad()};
    for (const auto& parameter : moe->parameters()) {
      all.push_back(parameter.grad().clone());
    }
    return all;
  };
  const int before = at::get_num_threads();
  const auto one = run(1);
  for (const int threads : {2, 3}) {
    const auto many = run(threads);
    for (size_t i = 0; i < one.size(); ++i) {
      CAPTURE(threads, i);
      CHECK(torch::equal(many[i], one[i]));
    }
  }
  at::set_num_threads(before);
}

TEST_CASE("MoE runs in every dtype and under autocast", "[nn]") {
  for (const auto dtype : kFloatTypes) {
    MoE moe(sizes());
    moe->to(dtype);
    const auto output = moe(wave({kTokens, kHidden}, 0, 1, dtype));
    const auto wide = dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
    CHECK(output.hidden_states.scalar_type() == dtype);
    CHECK(output.routing.logits.scalar_type() == wide);
    CHECK(output.aux_loss.scalar_type() == wide);
  }
  MoE moe(sizes());
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto output = moe(wave({kTokens, kHidden}, 0, 1, torch::kFloat32));
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  CHECK(output.hidden_states.scalar_type() == torch::kBFloat16);
  CHECK(output.routing.logits.scalar_type() == torch::kFloat32);
  CHECK(output.routing.weights.scalar_type() == torch::kFloat32);
}
