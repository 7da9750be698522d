#include <iostream>
#include <string>

#include <torch/torch.h>

#include <torchmoe/torchmoe.h>

using namespace torchmoe::nn;

int main(int /*argc*/, char** argv) {
  const std::string folder = argv[1];
  MoE moe(MoEOptions(16, 32, /*num_experts=*/8, /*top_k=*/2));
  torchmoe::load_state_dict(*moe, torchmoe::read_state_dict(folder + "/python.pt"));
  const auto x = torchmoe::read_state_dict(folder + "/tokens.pt")["x"];

  torch::optim::SGD optimizer(moe->parameters(), torch::optim::SGDOptions(0.1));
  const auto output = moe(x);
  (output.hidden_states.square().mean() + output.aux_loss).backward();
  optimizer.step();

  torchmoe::StateDict results;
  results.insert("y", output.hidden_states.detach());
  results.insert("y after the step", moe(x).hidden_states.detach());
  torchmoe::write_state_dict(results, folder + "/results.pt");
  torchmoe::write_state_dict(torchmoe::state_dict(*moe), folder + "/cpp.pt");
  for (const auto& item : torchmoe::state_dict(*moe)) {
    std::cout << item.key() << ' ' << item.value().sizes() << '\n';
  }
}
