// Routers, experts and shared experts that are other modules, or functions.
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "catch2.h"
#include "nn/layers.h"
#include "nn/moe.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Balance;
using torchmoe::nn::Estimator;
using torchmoe::nn::ExpertFunction;
using torchmoe::nn::Gate;
using torchmoe::nn::MoE;
using torchmoe::nn::MoEImpl;
using torchmoe::nn::MoEOptions;
using torchmoe::nn::SharedExperts;
using torchmoe::nn::TokenFunction;

TEST_CASE("a router is a module of any type or a function", "[nn]") {
  DeepRouter router;
  const auto expected = router->forward(tokens(7));
  MoE typed(sizes().router(router));
  MoE any(sizes().router(torch::nn::AnyModule(router)));
  MoE shared(sizes().router(router.ptr()));
  MoE function(sizes().router([&](const Tensor& x) { return router(x); }));
  for (auto& moe : {typed, any, shared, function}) {
    auto layer = moe;
    CHECK(torch::equal(layer(tokens(7)).routing.logits, expected));
  }
  CHECK(typed->named_parameters().contains("router.inner.weight"));
  CHECK(typed->router().as<torchmoe::nn::RouterImpl>() == nullptr);
  CHECK(typed->router().module() == router.ptr());
  CHECK_FALSE(function->named_parameters().contains("router.inner.weight"));
  CHECK_FALSE(function->router().module());
  typed(tokens(7)).hidden_states.sum().backward();
  CHECK(router->inner->weight.grad().abs().max().item<double>() > 0);
}

TEST_CASE("a Sequential is a part too", "[nn]") {
  torch::nn::Sequential router(torch::nn::Linear(6, 8), torch::nn::Tanh(), torch::nn::Linear(8, 4));
  MoE moe(sizes().router(router).shared_experts(torch::nn::Sequential(torch::nn::Linear(6, 6))));
  CHECK(torch::equal(moe(tokens(7)).routing.logits, router->forward(tokens(7))));
  CHECK(moe->named_parameters().contains("router.0.weight"));
  CHECK(moe->named_parameters().contains("shared_experts.0.bias"));
  MoE copy(std::dynamic_pointer_cast<MoEImpl>(moe->clone()));
  CHECK(torch::equal(copy(tokens(7)).hidden_states, moe(tokens(7)).hidden_states));
  CHECK(copy->router().module() != moe->router().module());
}

TEST_CASE("a class derived from the layer's own is called by its own forward", "[nn]") {
  struct HalvedImpl : torchmoe::nn::RouterImpl {
    using RouterImpl::RouterImpl;
    Tensor forward(const Tensor& x) { return RouterImpl::forward(x) / 2; }
  };
  const auto router = std::make_shared<HalvedImpl>(6, 4);
  MoE moe(sizes().router(router));
  CHECK(torch::equal(moe(tokens(7)).routing.logits, router->forward(tokens(7))));

  struct TenfoldImpl : torchmoe::nn::ExpertsImpl {
    using ExpertsImpl::ExpertsImpl;
    Tensor forward(const Tensor& x, const Tensor& indices, const Tensor& weights) {
      return 10 * ExpertsImpl::forward(x, indices, weights);
    }
  };
  const auto gradient = [&](const torchmoe::nn::ExpertFunction& experts) {
    MoE dense(sizes().router(router).experts(experts).gate(
        torchmoe::nn::Gate().estimator("straight_through_dense")));
    dense->zero_grad();
    dense(tokens(7)).hidden_states.sum().backward();
    return router->weight.grad().clone();
  };
  const auto experts = std::make_shared<TenfoldImpl>(6, 5, 4);
  const auto plain = [&](const Tensor& x, const Tensor& indices, const Tensor& weights) {
    return experts->ExpertsImpl::forward(x, indices, weights);
  };
  CHECK(torch::allclose(gradient(experts), 10 * gradient(plain), 1e-4, 1e-6));
}

TEST_CASE("options of parts make parts of each layer's own", "[nn]") {
  const auto options = sizes()
                           .shared_experts(torchmoe::nn::SharedExpertsOptions(6, 3))
                           .router(torchmoe::nn::RouterOptions(6, 4).bias(true));
  MoE first(options);
  MoE second(options);
  CHECK(first->router().module() != second->router().module());
  CHECK(first->shared_experts()->module() != second->shared_experts()->module());
  CHECK(first->named_parameters().contains("shared_experts.experts.gate_up_proj"));
}

TEST_CASE("a copy's options hold its own parts", "[nn]") {
  MoE moe(sizes().router(DeepRouter()).experts(Matrices()));
  MoE copy(std::dynamic_pointer_cast<MoEImpl>(moe->clone()));
  const auto held = [](const MoE& layer) {
    return std::get<TokenFunction>(*layer->options().router()).module();
  };
  CHECK(held(moe) == moe->router().module());
  CHECK(held(copy) == copy->router().module());
  CHECK(copy->options().experts()->module() == copy->experts().module());
  CHECK(held(copy) != held(moe));
}

TEST_CASE("a copy of a frozen part is frozen", "[nn]") {
  MoE moe(MoEOptions(6, 5, 4, 1).gate(torchmoe::nn::Gate().normalize("topk")));
  for (auto& parameter : moe->router().module()->parameters()) {
    parameter.set_requires_grad(false);
  }
  MoE copy(std::dynamic_pointer_cast<MoEImpl>(moe->clone()));
  CHECK_FALSE(copy->router().module()->parameters()[0].requires_grad());
  CHECK(copy->experts().module()->parameters()[0].requires_grad());
  CHECK(torch::equal(copy(tokens(7)).hidden_states, moe(tokens(7)).hidden_states));
}

TEST_CASE("what a part returns is checked", "[nn]") {
  const auto refuses = [](MoEOptions options, const std::string& message) {
    MoE moe(options);
    CHECK_THROWS_WITH(moe(tokens(7)), contains(message));
  };
  const auto returning = [](const Tensor& value) {
    return TokenFunction([=](const Tensor&) { return value; });
  };
  refuses(sizes().router(returning(torch::zeros({7, 3}))),
          "MoE: router must return [num_tokens, num_experts] = [7, 4], got shape [7, 3]");
  refuses(sizes().router(returning(torch::zeros({7, 4}, torch::kLong))),
          "MoE: router must return floating numbers, got Long");
  refuses(sizes().router(returning(Tensor())),
          "MoE: router must return a tensor [num_tokens, num_experts], got None");
  refuses(sizes().shared_experts(returning(torch::zeros({7, 4}))),
          "MoE: shared_experts must return [num_tokens, hidden_size] = [7, 6], got shape [7, 4]");
  refuses(sizes().experts(
              ExpertFunction([](const Tensor& x, const Tensor&, const Tensor&) { return x.t(); })),
          "MoE: experts must return [num_tokens, hidden_size] = [7, 6], got shape [6, 7]");
  const auto vector = [](const torchmoe::nn::LossInputs& inputs) { return inputs.logits.sum(0); };
  refuses(sizes().balance(Balance().losses({{"vector", vector, 1.0}})),
          "MoE: the term \"vector\" of balance.losses must return a scalar, got shape [4]");
  struct Wrong : Estimator {
    Tensor select(const Tensor& logits,
                  const std::optional<Tensor>&,
                  const std::optional<Tensor>&) override {
      return torch::zeros({logits.size(0), 1}, torch::kLong);
    }
  };
  refuses(sizes().gate(Gate().estimator(std::make_shared<Wrong>())),
          "MoE: gate.estimator.select must return int64 [num_tokens, top_k] = [7, 2], got Long of "
          "shape [7, 1]");
}

TEST_CASE("copies of a layer own copies of its modules", "[nn]") {
  MoE moe(sizes()
              .router(DeepRouter())
              .experts(Matrices())
              .shared_experts(SharedExperts(6, 3))
              .balance(Balance().selection_bias_rate(0.5)));
  moe->update(moe(tokens(7)).routing);
  moe->eval();
  MoE copy(std::dynamic_pointer_cast<MoEImpl>(moe->clone()));
  CHECK_FALSE(copy->router().module()->is_training());
  CHECK(copy->named_parameters().keys() == moe->named_parameters().keys());
  CHECK(copy->named_buffers().keys() == moe->named_buffers().keys());
  const auto before = moe(tokens(7));
  CHECK(torch::equal(copy(tokens(7)).hidden_states, before.hidden_states));
  {
    const torch::NoGradGuard no_grad;
    for (auto& parameter : copy->parameters()) {
      parameter.zero_();
    }
    copy->selection_bias.zero_();
  }
  CHECK(torch::equal(copy(tokens(7)).hidden_states, torch::zeros_like(tokens(7))));
  CHECK(torch::equal(moe(tokens(7)).hidden_states, before.hidden_states));
  CHECK(moe->selection_bias.abs().max().item<double>() == 0.5);
  // What the copy computes with is what it lists, and the other way round.
  copy->train();
  copy(tokens(7)).aux_loss.backward();
  CHECK(copy->named_parameters()["router.outer.weight"].grad().defined());
  CHECK_FALSE(moe->named_parameters()["router.outer.weight"].grad().defined());
}

TEST_CASE("replicas of a layer train one", "[nn]") {
  MoE moe(sizes().bias(true));
  const auto x = tokens(7);
  const auto grad = wave({7, 6}, 1, 1, torch::kFloat32);
  torch::autograd::backward({moe(x).hidden_states}, {grad});
  std::vector<Tensor> sums(moe->parameters().size());
  for (const auto& [begin, size] : {std::pair<int64_t, int64_t>{0, 3}, {3, 4}}) {
    MoE replica(std::dynamic_pointer_cast<MoEImpl>(moe->clone(torch::Device(torch::kCPU))));
    torch::autograd::backward({replica(x.narrow(0, begin, size)).hidden_states},
                              {grad.narrow(0, begin, size)});
    for (size_t i = 0; i < sums.size(); ++i) {
      const auto& of_part = replica->parameters()[i].grad();
      sums[i] = sums[i].defined() ? sums[i] + of_part : of_part;
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    CHECK(torch::allclose(sums[i], moe->parameters()[i].grad(), 1e-4, 1e-6));
  }
}
