#include "nn/attached_loss.h"

#include <memory>
#include <vector>

#include "catch2.h"
#include "nn/layers.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Balance;
using torchmoe::nn::MoE;
using torchmoe::nn::WithAttachedLoss;

TEST_CASE("a layer in a Sequential carries its loss", "[nn]") {
  MoE moe(sizes().balance(Balance(0.5)));
  WithAttachedLoss attached(moe, 0.25);
  int64_t seen = 0;
  attached->on_output = [&](const torchmoe::nn::MoEOutput& output) {
    seen += output.routing.tokens_per_expert.sum().item<int64_t>();
  };
  torch::nn::Sequential model(attached);
  const auto grad = wave({7, 6}, 1, 1, torch::kFloat32);
  torch::autograd::backward({model->forward(tokens(7))}, {grad});
  CHECK(seen == 14);
  std::vector<Tensor> expected;
  for (const auto& parameter : moe->parameters()) {
    expected.push_back(parameter.grad().clone());
  }
  moe->zero_grad();
  const auto output = moe(tokens(7));
  torch::autograd::backward({output.hidden_states, output.aux_loss}, {grad, torch::tensor(0.25)});
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(torch::allclose(moe->parameters()[i].grad(), expected[i]));
  }
  torch::nn::Sequential copy(std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone()));
  CHECK(torch::equal(copy->forward(tokens(7)), model->forward(tokens(7))));
  CHECK(seen == 28);
  CHECK_THROWS_WITH(attached->set_scale(INFINITY),
                    contains("WithAttachedLoss: scale must be a finite number, got inf"));
  CHECK_THROWS_WITH(WithAttachedLoss(MoE(nullptr)),
                    contains("WithAttachedLoss: moe must be a MoE, got an empty holder"));
}
