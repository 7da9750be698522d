// Runs one forward and backward of torchmoe::nn::MoE as a file describes it; the Python tests
// compare the numbers.
//
//   torchmoe_parity REQUEST RESULT
//
// REQUEST is a dict saved by torch.save:
//   config      the layer's settings: the arguments of MoEOptions, gate, capacity and router
//   flattened, None for a default dtype       a tensor of the layer's dtype parameters  {name:
//   tensor}, or None to draw them after `seed` x, grad, token_mask (or None), train, seed, threads
// RESULT is a dict of tensors for torch.load: outputs, routing, "losses.NAME", "parameters.NAME",
// "gradients.NAME".
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "nn/moe.h"

namespace {

using torchmoe::nn::CapacityOptions;
using torchmoe::nn::GateOptions;
using torchmoe::nn::MoE;
using torchmoe::nn::MoEOptions;
using torchmoe::nn::RouterOptions;

class Fields {
 public:
  explicit Fields(const c10::IValue& dict) : dict_(dict.toGenericDict()) {}

  template <typename T>
  T get(const std::string& name) const {
    return dict_.at(name).to<T>();
  }

  template <typename T>
  std::optional<T> find(const std::string& name) const {
    const auto value = dict_.at(name);
    return value.isNone() ? std::nullopt : std::optional<T>(value.to<T>());
  }

  c10::IValue at(const std::string& name) const { return dict_.at(name); }

  const c10::impl::GenericDict& entries() const { return dict_; }

 private:
  c10::impl::GenericDict dict_;
};

std::vector<int64_t> backup_of(const Fields& config) {
  const auto table = config.find<at::Tensor>("capacity_backup");
  return table ? std::vector<int64_t>(table->data_ptr<int64_t>(),
                                      table->data_ptr<int64_t>() + table->numel())
               : std::vector<int64_t>();
}

MoEOptions options_of(const Fields& config) {
  const auto hidden_size = config.get<int64_t>("hidden_size");
  const auto num_experts = config.get<int64_t>("num_experts");
  MoEOptions options(hidden_size,
                     config.get<int64_t>("intermediate_size"),
                     num_experts,
                     config.get<int64_t>("top_k"));
  options.activation(config.get<std::string>("activation"))
      .bias(config.get<bool>("bias"))
      .balance_weight(config.get<double>("balance_weight"))
      .z_loss_weight(config.get<double>("z_loss_weight"))
      .gate(GateOptions()
                .score_function(config.get<std::string>("score_function"))
                .normalize(config.find<std::string>("normalize"))
                .estimator(config.get<std::string>("estimator")))
      .router(RouterOptions(hidden_size, num_experts)
                  .bias(config.get<bool>("router_bias"))
                  .input_jitter(config.get<double>("input_jitter"))
                  .logit_noise(config.get<double>("logit_noise")));
  if (const auto factor = config.find<double>("capacity_factor")) {
    options.capacity(CapacityOptions(*factor)
                         .eval_factor(config.find<double>("capacity_eval_factor"))
                         .minimum(config.get<int64_t>("capacity_minimum"))
                         .order(config.get<std::string>("capacity_order"))
                         .overflow(config.get<std::string>("capacity_overflow"))
                         .backup(backup_of(config))
                         .normalize(config.get<std::string>("capacity_normalize")));
  }
  return options;
}

void load_parameters(MoE& moe, const Fields& parameters) {
  torch::NoGradGuard no_grad;
  auto named = moe->named_parameters();
  TORCH_CHECK(named.size() == parameters.entries().size(),
              "parity: parameters must be ",
              named.keys(),
              ", got ",
              parameters.entries().size());
  for (auto& parameter : named) {
    parameter->copy_(parameters.get<at::Tensor>(parameter.key()));
  }
}

c10::Dict<std::string, at::Tensor> run(const Fields& request) {
  at::set_num_threads(static_cast<int>(request.get<int64_t>("threads")));
  const auto seed = static_cast<uint64_t>(request.get<int64_t>("seed"));
  torch::manual_seed(seed);
  MoE moe(options_of(Fields(request.at("config"))));
  moe->to(request.get<at::Tensor>("dtype").scalar_type());
  moe->train(request.get<bool>("train"));
  if (const auto parameters = request.at("parameters"); !parameters.isNone()) {
    load_parameters(moe, Fields(parameters));
  }

  const auto x = request.get<at::Tensor>("x").detach().requires_grad_();
  torch::manual_seed(seed);
  const auto [hidden_states, aux_loss, routing] = moe(x, request.find<at::Tensor>("token_mask"));
  torch::autograd::backward({hidden_states, aux_loss},
                            {request.get<at::Tensor>("grad"), at::Tensor()});

  c10::Dict<std::string, at::Tensor> result;
  const auto put = [&](const std::string& name, const at::Tensor& value) {
    result.insert(name, value.detach().contiguous());
  };
  put("hidden_states", hidden_states);
  put("aux_loss", aux_loss);
  put("logits", routing.logits);
  put("weights", routing.weights);
  put("selected", routing.selected);
  put("indices", routing.indices);
  put("tokens_per_expert", routing.tokens_per_expert);
  put("kept_per_expert", routing.kept_per_expert);
  for (const auto& [name, loss] : routing.losses) {
    put("losses." + name, loss);
  }
  put("gradients.x", x.grad());
  for (const auto& parameter : moe->named_parameters()) {
    put("parameters." + parameter.key(), *parameter);
    put("gradients." + parameter.key(), parameter->grad());
  }
  return result;
}

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "parity: REQUEST must be a readable file, got ", path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write(const char* path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  TORCH_CHECK(file.flush(), "parity: RESULT must be a writable path, got ", path);
}

}  // namespace

int main(int argc, char* argv[]) {
  if (argc != 3) {
    std::cerr << "usage: torchmoe_parity REQUEST RESULT\n";
    return 2;
  }
  try {
    write(argv[2], torch::pickle_save(run(Fields(torch::pickle_load(read(argv[1]))))));
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
