// What MoEImpl::update moves, and nothing else does.
#include <string>
#include <vector>

#include "catch2.h"
#include "nn/layers.h"
#include "nn/moe.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Assistance;
using torchmoe::nn::Balance;
using torchmoe::nn::MoE;

TEST_CASE("a forward pass moves nothing", "[nn]") {
  MoE moe(sizes()
              .balance(Balance(0.1).selection_bias_rate(0.1).fraction_from("history"))
              .assistance(Assistance({1, 2, 3, 0}).patience(1)));
  std::vector<Tensor> before;
  for (const auto& buffer : moe->buffers()) {
    before.push_back(buffer.clone());
  }
  CHECK(before.size() == 4);
  moe(tokens()).aux_loss.backward();
  for (size_t i = 0; i < before.size(); ++i) {
    CHECK(torch::equal(moe->buffers()[i], before[i]));
  }
}

TEST_CASE("a layer whose update is forgotten says so once", "[nn]") {
  struct Counting : c10::WarningHandler {
    void process(const c10::Warning& warning) override { messages.push_back(warning.msg()); }
    std::vector<std::string> messages;
  } handler;
  const c10::WarningUtils::WarningHandlerGuard guard(&handler);
  const auto run = [&](MoE& moe) {
    for (int pass = 0; pass < 250; ++pass) {
      moe(tokens().narrow(0, 0, 1));
    }
  };
  MoE plain(sizes());
  MoE updated(sizes().balance(Balance().selection_bias_rate(0.1)));
  updated->update(routing_of({1, 1, 1, 1}));
  MoE evaluated(sizes().balance(Balance().selection_bias_rate(0.1)));
  evaluated->eval();
  run(plain);
  run(updated);
  run(evaluated);
  CHECK(handler.messages.empty());
  MoE forgotten(sizes().balance(Balance().selection_bias_rate(0.1)));
  run(forgotten);
  REQUIRE(handler.messages.size() == 1);
  CHECK_THAT(
      handler.messages[0],
      contains("MoE: update must be called once per optimizer step for a selection bias, got "
               "100 forward passes in training without: moe->update(output.routing)"));
}
