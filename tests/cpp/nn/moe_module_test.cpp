// MoE as a torch module: names, copies, archives, printing, refusals.
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "catch2.h"
#include "nn/moe.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::CapacityOptions;
using torchmoe::nn::GateOptions;
using torchmoe::nn::MoE;
using torchmoe::nn::MoEImpl;
using torchmoe::nn::MoEOptions;
using torchmoe::nn::MoEOutput;
using torchmoe::nn::RouterOptions;

namespace {

MoEOptions sizes() {
  return {6, 5, 4, 2};
}

Tensor tokens() {
  return wave({7, 6}, 0, 1, torch::kFloat32);
}

}  // namespace

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
  MoE moe(sizes().bias(true).capacity(CapacityOptions(0.5)));
  moe->to(torch::kFloat64);
  moe->eval();
  const auto x = tokens().to(torch::kFloat64);
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
    CHECK_FALSE(torch::equal(loaded(tokens()).hidden_states, saved(tokens()).hidden_states));
    torch::load(loaded, stream);
    CHECK(torch::equal(loaded(tokens()).hidden_states, saved(tokens()).hidden_states));
  }
}

TEST_CASE("MoE draws the same parameters from the same seed", "[nn]") {
  torch::manual_seed(1);
  MoE moe(sizes().bias(true));
  const auto first = moe(tokens()).hidden_states;
  torch::manual_seed(1);
  moe->reset_parameters();
  CHECK(torch::equal(moe(tokens()).hidden_states, first));
  moe->reset_parameters();
  CHECK_FALSE(torch::equal(moe(tokens()).hidden_states, first));
}

TEST_CASE("MoE works where a module of unknown type is called", "[nn]") {
  MoE moe(sizes());
  torch::nn::AnyModule any(moe);
  const auto expected = moe(tokens()).hidden_states;
  CHECK(torch::equal(any.forward<MoEOutput>(tokens()).hidden_states, expected));
  const std::optional<Tensor> mask = torch::ones({7}, torch::kBool);
  CHECK(torch::equal(any.forward<MoEOutput>(tokens(), mask).hidden_states, expected));
}

TEST_CASE("MoE learns with an optimizer of LibTorch", "[nn]") {
  MoE moe(sizes());
  torch::optim::SGD optimizer(moe->parameters(), 0.1);
  const auto step = [&] {
    optimizer.zero_grad();
    const auto output = moe(tokens());
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
  text << MoE(sizes().capacity(CapacityOptions(1.25).eval_factor(2.0)));
  CHECK(text.str() ==
        "torchmoe::nn::MoE(hidden_size=6, num_experts=4, top_k=2, score_function=softmax, "
        "normalize=topk, estimator=exact, capacity_factor=1.25, eval_capacity_factor=2, "
        "order=choice, overflow=drop, balance_weight=0.01, z_loss_weight=0)(\n"
        "  (router): torchmoe::nn::Router(hidden_size=6, num_experts=4)\n"
        "  (experts): torchmoe::nn::Experts(hidden_size=6, intermediate_size=5, num_experts=4, "
        "activation=swiglu)\n"
        ")");
}

TEST_CASE("MoE refuses what no layer can be", "[nn]") {
  const auto refuses = [](const MoEOptions& options, const std::string& message) {
    CHECK_THROWS_WITH(MoE(options), contains(message));
  };
  refuses({0, 5, 4, 2}, "MoE: hidden_size must be >= 1, got 0");
  refuses({6, 0, 4, 2}, "Experts: intermediate_size must be >= 1, got 0");
  refuses({6, 5, 0, 2}, "MoE: num_experts must be >= 1, got 0");
  refuses({6, 5, 4, 0}, "MoE: top_k must be in [1, 4], got 0");
  refuses({6, 5, 4, 5}, "MoE: top_k must be in [1, 4], got 5");
  refuses(sizes().activation("glu"), "Experts: activation must be one of ");
  refuses(sizes().balance_weight(-1), "MoE: balance_weight must be a finite number >= 0, got -1");
  refuses(sizes().z_loss_weight(std::numeric_limits<double>::infinity()),
          "MoE: z_loss_weight must be a finite number >= 0, got inf");
  refuses(sizes().gate(GateOptions().score_function("relu")),
          "Gate: score_function must be one of \"softmax\", \"sigmoid\", got \"relu\"");
  refuses(sizes().gate(GateOptions().normalize("sum")),
          "Gate: normalize must be one of \"none\", \"topk\", \"uniform\", got \"sum\"");
  refuses(sizes().gate(GateOptions().estimator("reinforce")),
          "Gate: estimator must be one of \"exact\", \"straight_through\", got \"reinforce\"");
  refuses(sizes().capacity(CapacityOptions(-1)), "Capacity: factor must be a finite number >= 0");
  refuses(sizes().capacity(CapacityOptions(1).eval_factor(-1)),
          "Capacity: eval_factor must be a finite number >= 0, got -1");
  refuses(sizes().capacity(CapacityOptions(1).minimum(-1)),
          "Capacity: minimum must be >= 0, got -1");
  refuses(sizes().capacity(CapacityOptions(1).order("random")),
          "Capacity: order must be one of \"choice\", \"token\", got \"random\"");
  refuses(sizes().capacity(CapacityOptions(1).overflow("wait")),
          "Capacity: overflow must be one of \"drop\", \"next_best\", \"backup\", got \"wait\"");
  refuses(sizes().capacity(CapacityOptions(1).overflow("backup")),
          "Capacity: backup must have 4 entries with overflow \"backup\", got 0");
  refuses(sizes().capacity(CapacityOptions(1).backup({1, 0, 3, 2})),
          "Capacity: backup must have 0 entries with overflow \"drop\", got 4");
  refuses(sizes().capacity(CapacityOptions(1).overflow("backup").backup({1, 0, 2, 3})),
          "Capacity: backup must be another expert in [0, 4) for every expert, got 2 for expert 2");
  refuses(sizes().capacity(CapacityOptions(1).overflow("backup").backup({1, 0, 3, 4})),
          "Capacity: backup must be another expert in [0, 4) for every expert, got 4 for expert 3");
  refuses(sizes().capacity(CapacityOptions(1).normalize("never")),
          "Capacity: normalize must be one of \"before_drop\", \"after_drop\", got \"never\"");
  refuses(sizes().router(RouterOptions(6, 5)), "MoE: router must have num_experts 4, got 5");
  refuses(sizes().router(RouterOptions(7, 4)), "MoE: router must have hidden_size 6, got 7");
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
}
