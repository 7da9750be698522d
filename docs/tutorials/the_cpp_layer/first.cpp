#include <cstdio>

#include <torch/torch.h>

#include <torchmoe/torchmoe.h>

using namespace torchmoe::nn;

int main() {
  torch::manual_seed(0);
  const auto options = MoEOptions(16, 32, /*num_experts=*/8, /*top_k=*/2)
                           .capacity(Capacity(1.25).overflow("next_best"))
                           .balance(Balance(0).selection_bias_rate(0.001));
  MoE moe(options);
  torch::optim::AdamW optimizer(moe->parameters(), torch::optim::AdamWOptions(1e-2));

  std::printf("step   loss    slots of the busiest expert   of the idlest\n");
  for (int step = 0; step <= 200; ++step) {
    const auto x = torch::randn({4, 64, 16});
    const auto output = moe(x);  // hidden_states like x, aux_loss, routing
    const auto loss = torch::mse_loss(output.hidden_states, x.sin()) + output.aux_loss;
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    moe->update(output.routing);  // here it moves the selection bias
    if (step % 50 == 0) {
      const auto& load = output.routing.tokens_per_expert;
      std::printf("%4d   %.3f   %27ld   %13ld\n",
                  step,
                  loss.item<double>(),
                  load.max().item<long>(),
                  load.min().item<long>());
    }
  }
}
