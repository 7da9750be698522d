// MoE as a torch module: names, copies, archives, printing, refusals.
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "catch2.h"
#include "nn/layers.h"
#include "nn/moe.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Balance;
using torchmoe::nn::Capacity;
using torchmoe::nn::Gate;
using torchmoe::nn::MoE;
using torchmoe::nn::MoEImpl;
using torchmoe::nn::MoEOptions;
using torchmoe::nn::MoEOutput;
using torchmoe::nn::RouterOptions;

TEST_CASE("MoE names its parameters", "[nn]") {
  const auto keys = [](const MoEOptions& options) {
    return MoE(options)->named_parameters().keys();
  };
  CHECK(keys(sizes()) ==
        std::vector<std::string>{"router.weight", "experts.gate_up_proj", "experts.down_proj"});
  CHECK(keys(sizes().activation("relu").bias(true).router(RouterOptions(6, 4).bias(true))) ==
        std::vector<std::string>{"router.weight",
                                 "router.bias",
                                 "experts.up_proj",
                                 "experts.up_proj_bias",
                                 "experts.down_proj",
                                 "experts.down_proj_bias"});
}

TEST_CASE("MoE clones deeply", "[nn]") {
  MoE moe(sizes().bias(true).capacity(Capacity(0.5)));
  moe->to(torch::kFloat64);
  moe->eval();
  const auto x = tokens(7).to(torch::kFloat64);
  MoE copy(std::dynamic_pointer_cast<MoEImpl>(moe->clone()));
  const auto before = moe(x).hidden_states;
  CHECK_FALSE(copy->is_training());
  CHECK(torch::equal(copy(x).hidden_states, before));
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : copy->parameters()) {
      parameter.zero_();
    }
  }
  CHECK(torch::equal(copy(x).hidden_states, torch::zeros_like(x)));
  CHECK(torch::equal(moe(x).hidden_states, before));
}

TEST_CASE("MoE goes through an archive", "[nn]") {
  for (const bool bias : {false, true}) {
    CAPTURE(bias);
    MoE saved(sizes().bias(bias));
    MoE loaded(sizes().bias(bias));
    std::stringstream stream;
    torch::save(saved, stream);
    CHECK_FALSE(torch::equal(loaded(tokens(7)).hidden_states, saved(tokens(7)).hidden_states));
    torch::load(loaded, stream);
    CHECK(torch::equal(loaded(tokens(7)).hidden_states, saved(tokens(7)).hidden_states));
  }
}

TEST_CASE("MoE draws the same parameters from the same seed", "[nn]") {
  torch::manual_seed(1);
  MoE moe(sizes().bias(true));
  const auto first = moe(tokens(7)).hidden_states;
  torch::manual_seed(1);
  moe->reset_parameters();
  CHECK(torch::equal(moe(tokens(7)).hidden_states, first));
  moe->reset_parameters();
  CHECK_FALSE(torch::equal(moe(tokens(7)).hidden_states, first));
}

TEST_CASE("MoE works where a module of unknown type is called", "[nn]") {
  MoE moe(sizes());
  torch::nn::AnyModule any(moe);
  const auto expected = moe(tokens(7)).hidden_states;
  CHECK(torch::equal(any.forward<MoEOutput>(tokens(7)).hidden_states, expected));
  const Tensor mask = torch::ones({7}, torch::kBool);
  CHECK(torch::equal(any.forward<MoEOutput>(tokens(7), mask).hidden_states, expected));
  const Tensor counts = torch::ones({4}, torch::kLong);
  CHECK(torch::equal(any.forward<MoEOutput>(tokens(7), mask, counts).hidden_states, expected));
}

TEST_CASE("MoE learns with an optimizer of LibTorch", "[nn]") {
  MoE moe(sizes());
  torch::optim::SGD optimizer(moe->parameters(), 0.1);
  const auto step = [&] {
    optimizer.zero_grad();
    const auto output = moe(tokens(7));
    const auto loss = (output.hidden_states - 1).square().mean() + output.aux_loss;
    loss.backward();
    optimizer.step();
    return loss.item<double>();
  };
  const double first = step();
  for (int i = 0; i < 20; ++i) {
    step();
  }
  CHECK(step() < first);
}

TEST_CASE("MoE prints what it is made of", "[nn]") {
  std::ostringstream text;
  text << MoE(sizes().capacity(Capacity(1.25).eval_factor(2.0).overflow("next_best")));
  CHECK(text.str() ==
        "torchmoe::nn::MoE(hidden_size=6, num_experts=4, top_k=2, score_function=softmax, "
        "normalize=topk, estimator=Exact, capacity=Capacity(factor=1.25, eval_factor=2.0, "
        "overflow='next_best'), balance=Balance())(\n"
        "  (router): torchmoe::nn::Router(hidden_size=6, num_experts=4)\n"
        "  (experts): torchmoe::nn::Experts(hidden_size=6, intermediate_size=5, num_experts=4, "
        "activation=swiglu)\n"
        ")");
  std::ostringstream more;
  const auto zero = [](const torchmoe::nn::LossInputs& inputs) { return inputs.logits.sum() * 0; };
  more << Balance(0.5).fraction_from("history").losses({{"energy", zero, 0.25}}) << ' '
       << Capacity(1).overflow("backup").backup({1, 2, 3, 0}).dynamic(true);
  CHECK(more.str() ==
        "Balance(weight=0.5, losses=[('energy', 0.25)], fraction_from='history') "
        "Capacity(factor=1.0, overflow='backup', backup=(1, 2, 3, 0), dynamic=True)");
  std::ostringstream all;
  all << MoE(sizes()
                 .balance(Balance().selection_bias_rate(0.001))
                 .assistance(torchmoe::nn::Assistance({1, 2, 3, 0}).patience(3))
                 .routed_scaling_factor(2.5)
                 .router(RouterOptions(6, 4).usage_scaling(true)));
  CHECK_THAT(all.str(), contains("balance=Balance(selection_bias_rate=0.001), routed_scaling"));
  CHECK_THAT(all.str(), contains("Router(hidden_size=6, num_experts=4, usage_scaling=true)"));
  CHECK_THAT(all.str(),
             contains("(assistance): torchmoe::nn::Assistance(backup=(1, 2, 3, 0), threshold=1.5, "
                      "lower_threshold=1.25, patience=3)"));
}

// What Python refuses too, tests/python/nn/test_cpp_parity.py compares word for word.
TEST_CASE("MoE refuses what no layer can be", "[nn]") {
  const auto refuses = [](const MoEOptions& options, const std::string& message) {
    CHECK_THROWS_WITH(MoE(options), contains(message));
  };
  refuses(sizes().gate(Gate().estimator("reinforce")),
          "Gate: estimator must be one of \"exact\", \"straight_through\", "
          "\"straight_through_dense\", got \"reinforce\"");
  refuses(sizes().gate(Gate().estimator(std::shared_ptr<torchmoe::nn::Estimator>())),
          "Gate: estimator must be a name or an Estimator, got a null pointer");
  refuses(sizes().balance(Balance().losses({{"energy", nullptr, 0.1}})),
          "Balance: losses must hold a function in each term, got none for \"energy\"");
  const auto zero = [](const torchmoe::nn::LossInputs& inputs) { return inputs.logits.sum() * 0; };
  refuses(sizes().balance(Balance().losses({{"energy", zero, 0.1}, {"energy", zero, 0.2}})),
          "Balance: losses must name every term once, ");
  refuses(sizes().balance(Balance().z_loss_weight(1).losses({{"router_z_loss", zero, 0.1}})),
          "got \"router_z_loss\"");
  refuses(sizes().router(RouterOptions(6, 5)), "MoE: router must have num_experts 4, got 5");
  refuses(sizes().router(RouterOptions(7, 4)), "MoE: router must have hidden_size 6, got 7");
  refuses(sizes().experts(torchmoe::nn::Experts(6, 5, 3)),
          "MoE: experts must have num_experts 4, got 3");
  refuses(sizes().experts(torchmoe::nn::Experts(5, 5, 4)),
          "MoE: experts must have hidden_size 6, got 5");
  using Function = std::function<Tensor(const Tensor&)>;
  CHECK_THROWS_WITH(sizes().router(Function()), contains("MoE: a part must be a module or"));
  CHECK_THROWS_WITH(sizes().router(std::shared_ptr<torch::nn::LinearImpl>()),
                    contains("MoE: a part must be a module or a function, got an empty one"));
  CHECK_THROWS_WITH(sizes().router(torch::nn::Linear(nullptr)),
                    contains("MoE: a part must be a module or a function, got an empty one"));
  CHECK_THROWS_WITH(sizes().experts(torch::nn::AnyModule()),
                    contains("MoE: a part must be a module or a function, got an empty one"));
}

TEST_CASE("a layer resets what it draws, and its parts once", "[nn]") {
  MoE moe(sizes());
  const auto router = moe->router().module();
  CHECK_THROWS_WITH(moe->reset(), contains("reset_parameters() draws parameters anew"));
  CHECK(moe->router().module() == router);
}

TEST_CASE("MoE checks settings that are replaced, and keeps the old ones", "[nn]") {
  MoE moe(sizes());
  CHECK_THROWS_WITH(moe->set_capacity(Capacity(-1)),
                    contains("Capacity: factor must be a finite number >= 0, got -1.0"));
  CHECK_THROWS_WITH(moe->set_capacity(Capacity(1).dynamic(true)),
                    contains("MoE: router must keep usage for a dynamic capacity"));
  CHECK_THROWS_WITH(
      moe->set_balance(Balance().selection_bias_rate(0.1)),
      contains("MoE: balance.selection_bias_rate must stay 0 in a layer that was made "
               "without a selection bias, got 0.1"));
  CHECK_THROWS_WITH(moe->set_routed_scaling_factor(-1),
                    contains("MoE: routed_scaling_factor must"));
  CHECK_FALSE(moe->options().capacity());
  const auto before = moe(tokens(7));
  moe->set_capacity(Capacity(0.25));
  moe->set_balance(Balance(0.5));
  moe->set_routed_scaling_factor(2);
  const auto after = moe(tokens(7));
  CHECK(after.routing.kept_per_expert.max().item<int64_t>() == 1);
  CHECK(torch::allclose(after.aux_loss, 50 * before.aux_loss));
  moe->set_capacity(std::nullopt);
  CHECK(torch::equal(moe(tokens(7)).hidden_states, 2 * before.hidden_states));
}

TEST_CASE("MoE refuses input that does not fit", "[nn]") {
  MoE moe(sizes());
  CHECK_THROWS_WITH(moe(torch::ones({3, 5})),
                    contains("MoE: x must be [..., hidden_size] = [..., 6], got shape [3, 5]"));
  CHECK_THROWS_WITH(moe(torch::scalar_tensor(1.0)), contains("MoE: x must be "));
  CHECK_THROWS_WITH(moe(torch::ones({2, 3, 6}), torch::ones({6}, torch::kBool)),
                    contains("MoE: token_mask must be bool of shape [2, 3], got "));
  CHECK_THROWS_WITH(moe(torch::ones({3, 6}), torch::ones({3})),
                    contains("MoE: token_mask must be bool of shape [3], got "));
  CHECK_THROWS_WITH(moe(Tensor()), contains("MoE: x must be a tensor, got None"));
  const auto with_counts = [&](const Tensor& counts) { moe(tokens(7), Tensor(), counts); };
  CHECK_THROWS_WITH(
      with_counts(torch::ones({4})),
      contains("MoE: earlier_counts must be integers [num_experts] = [4], got Float"));
  CHECK_THROWS_WITH(with_counts(torch::full({4}, -1, torch::kLong)),
                    contains("MoE: earlier_counts must be finite and >= 0, got -1"));
  CHECK_THROWS_WITH(moe->update(at::ArrayRef<torchmoe::nn::Routing>()),
                    contains("MoE: routing must hold at least one Routing, got an empty list"));
  CHECK_THROWS_WITH(moe->update(torchmoe::nn::Routing()),
                    contains("MoE: routing must be what forward returned, got an empty Routing"));
}
