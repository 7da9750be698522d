#include "nn/remembering.h"

#include <memory>
#include <sstream>
#include <string>
#include <utility>

#include "catch2.h"
#include "nn/layers.h"
#include "nn/moe.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Balance;
using torchmoe::nn::MoE;
using torchmoe::nn::MoEImpl;
using torchmoe::nn::RouterImpl;

TEST_CASE("buffers that move in small steps stay wide", "[nn]") {
  MoE moe(sizes()
              .balance(Balance().selection_bias_rate(0.5).fraction_from("history"))
              .assistance(torchmoe::nn::Assistance({1, 2, 3, 0})));
  moe->update(moe(tokens(7)).routing);
  const auto bias = moe->selection_bias.clone();
  moe->to(torch::kBFloat16);
  for (const auto& buffer : moe->named_buffers()) {
    CAPTURE(buffer.key());
    CHECK(buffer->scalar_type() == torch::kFloat32);
  }
  for (const auto& parameter : moe->parameters()) {
    CHECK(parameter.scalar_type() == torch::kBFloat16);
  }
  CHECK(torch::equal(moe->selection_bias, bias));
  CHECK(torch::equal(moe->named_buffers()["selection_bias"], bias));
  moe->to(torch::Device(torch::kCPU), torch::kFloat64);
  CHECK(moe->selection_bias.scalar_type() == torch::kFloat64);
  moe->to(torch::Device(torch::kCPU), torch::kHalf);
  CHECK(moe->selection_bias.scalar_type() == torch::kFloat64);
  MoE copy(std::dynamic_pointer_cast<MoEImpl>(moe->clone()));
  CHECK(copy->selection_bias.scalar_type() == torch::kFloat64);
  CHECK(copy->parameters()[0].scalar_type() == torch::kHalf);
  CHECK(torch::equal(copy->selection_bias, moe->selection_bias));
  // Inside another module, which is what gets moved.
  struct Model : torch::nn::Module {
    explicit Model(MoE layer) : moe(register_module("moe", std::move(layer))) {}
    MoE moe;
  } model{MoE(sizes().balance(Balance().selection_bias_rate(0.5)))};
  model.to(torch::kHalf);
  CHECK(model.moe->selection_bias.scalar_type() == torch::kFloat32);
}

TEST_CASE("an archive has what the layer remembers", "[nn]") {
  const auto make = [] {
    return MoE(sizes()
                   .balance(Balance().selection_bias_rate(0.5).fraction_from("history"))
                   .assistance(torchmoe::nn::Assistance({1, 2, 3, 0}).patience(1)));
  };
  auto saved = make();
  saved->update(saved(tokens(7)).routing);
  std::stringstream stream;
  torch::save(saved, stream);
  auto loaded = make();
  torch::load(loaded, stream);
  CHECK(torch::equal(loaded(tokens(7)).hidden_states, saved(tokens(7)).hidden_states));
  CHECK(torch::equal(loaded->selection_bias, saved->selection_bias));
  CHECK(torch::equal(loaded->router().as<RouterImpl>()->usage,
                     saved->router().as<RouterImpl>()->usage));
  CHECK(torch::equal(loaded->assistance->updates_above, saved->assistance->updates_above));
}
