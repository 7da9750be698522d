// The layer and its plan on the GPU against the CPU. Hidden from the default run: torchmoe_tests
// "[cuda]" runs it, and fails where there is no GPU.
#include <memory>
#include <string>
#include <vector>

#include "support.h"
#include "torchmoe.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::DispatchPlan;

using torchmoe::nn::Balance;
using torchmoe::nn::Capacity;
using torchmoe::nn::MoE;
using torchmoe::nn::MoEImpl;
using torchmoe::nn::MoEOptions;

namespace {

constexpr int64_t kTokens = 93, kHidden = 40, kInner = 24, kExperts = 6, kTopK = 2;

void require_gpu() {
  if (!torch::cuda::is_available()) {
    FAIL("the tests tagged [cuda] need a CUDA device, and torch finds none");
  }
}

// The output, the loss, the ids and every gradient, on the CPU.
std::vector<Tensor> step(MoE& moe, const Tensor& x, const Tensor& grad) {
  const Tensor tokens = x.detach().requires_grad_();
  const auto output = moe->forward(tokens);
  std::vector<Tensor> inputs{tokens};
  for (const Tensor& parameter : moe->parameters()) {
    inputs.push_back(parameter);
  }
  std::vector<Tensor> results{output.hidden_states.detach().cpu(),
                              output.aux_loss.detach().cpu(),
                              output.routing.indices.cpu(),
                              output.routing.kept_per_expert.cpu()};
  const auto ones = torch::ones_like(output.aux_loss);
  for (const Tensor& gradient :
       torch::autograd::grad({output.hidden_states, output.aux_loss}, inputs, {grad, ones})) {
    results.push_back(gradient.cpu());
  }
  return results;
}

}  // namespace

TEST_CASE("the layer on the GPU gives the CPU's numbers", "[.][cuda]") {
  require_gpu();
  for (const std::string overflow : {"drop", "next_best"}) {
    for (const std::string activation : {"swiglu", "gelu"}) {
      INFO(overflow << " " << activation);
      MoE on_cpu(MoEOptions(kHidden, kInner, kExperts, kTopK)
                     .activation(activation)
                     .bias(true)
                     .capacity(Capacity(1.0).overflow(overflow))
                     .balance(Balance().z_loss_weight(0.001)));
      MoE on_gpu(std::dynamic_pointer_cast<MoEImpl>(on_cpu->clone(torch::Device(torch::kCUDA))));
      const Tensor x = wave({kTokens, kHidden}, 0, 1, torch::kFloat);
      const Tensor grad = wave({kTokens, kHidden}, 1, 1, torch::kFloat);
      const auto expected = step(on_cpu, x, grad);
      const auto actual = step(on_gpu, x.cuda(), grad.cuda());
      REQUIRE(actual.size() == expected.size());
      for (size_t i = 0; i < expected.size(); ++i) {
        INFO("result " << i);
        // Router, two products and a gradient follow one another.
        CHECK(difference(actual[i], expected[i], 4 * kTokens * kTopK) == "");
      }
      CHECK(torch::equal(actual[2], expected[2]));
      CHECK(torch::equal(actual[3], expected[3]));
      const auto again = step(on_gpu, x.cuda(), grad.cuda());
      for (size_t i = 0; i < again.size(); ++i) {
        CHECK(torch::equal(again[i], actual[i]));
      }
    }
  }
}

TEST_CASE("the plan on the GPU is the CPU's", "[.][cuda]") {
  require_gpu();
  for (const Choice& choice : choices()) {
    INFO(choice.name);
    const auto plan = torchmoe::dispatch_plan(choice.indices.cuda(), 4);
    const DispatchPlan on_cpu{
        plan.expert_offsets.cpu(), plan.row_to_slot.cpu(), plan.slot_to_row.cpu()};
    CHECK(same_plan(on_cpu, torchmoe::dispatch_plan(choice.indices, 4)));
  }
}
