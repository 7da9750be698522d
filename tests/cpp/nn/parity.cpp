// Trains torchmoe::nn::MoE a few steps as a file describes it; the Python tests compare the values.
//
//   torchmoe_parity REQUEST RESULT
//
// REQUEST is a dict saved by torch.save: `threads`, and `cases`, a list of dicts:
//   config   the layer's settings, by the names of the Python layer (absent ones are None)
//   dtype    a tensor of the layer's type
//   state    {name: tensor} for parameters and buffers, or None to draw them after `seed`
//   files    what state is read from first and written to at last, or None
//   steps    a list of optimizer steps, each a list of micro-batches {x, grad, token_mask}
//   seed
// RESULT is a dict of tensors for torch.load: for case 3, "3.step0.batch1.logits" and so on, and
// "3.state.NAME" at the end; or "3.error", the bytes of a message.
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "torchmoe.h"

namespace {

namespace nn = torchmoe::nn;
using at::Tensor;

class Fields {
 public:
  explicit Fields(const c10::IValue& dict) : dict_(dict.toGenericDict()) {}

  bool has(const std::string& name) const {
    return dict_.contains(name) && !dict_.at(name).isNone();
  }
  c10::IValue at(const std::string& name) const { return dict_.at(name); }
  template <typename T>
  T get(const std::string& name) const {
    return dict_.at(name).to<T>();
  }
  template <typename T>
  std::optional<T> find(const std::string& name) const {
    return has(name) ? std::optional<T>(dict_.at(name).to<T>()) : std::nullopt;
  }
  std::optional<Fields> fields(const std::string& name) const {
    return has(name) ? std::optional<Fields>(at(name)) : std::nullopt;
  }
  std::vector<int64_t> list(const std::string& name) const {
    const auto table = get<Tensor>(name);
    const auto* entries = table.data_ptr<int64_t>();
    return {entries, entries + table.numel()};
  }

 private:
  c10::impl::GenericDict dict_;
};

// ---- custom parts, the same as in the Python test -----------------------------------------------

struct ScalesImpl : torch::nn::Cloneable<ScalesImpl> {
  ScalesImpl(int64_t num_experts, int64_t hidden_size) : sizes{num_experts, hidden_size} {
    reset();
  }
  void reset() override { scale = register_parameter("scale", torch::ones(sizes)); }

  Tensor forward(const Tensor& x, const Tensor& indices, const Tensor& weights) {
    const auto used = weights.masked_fill(indices.lt(0), 0).to(x.scalar_type()).unsqueeze(-1);
    const auto scales = scale.index_select(0, indices.clamp_min(0).flatten())
                            .view({indices.size(0), indices.size(1), scale.size(1)});
    return (used * scales).sum(1) * x;
  }

  std::vector<int64_t> sizes;
  Tensor scale;
};
TORCH_MODULE(Scales);

struct Temperature : nn::Estimator {
  Tensor weigh(const Tensor& logits, const Tensor& indices) override {
    return Estimator::weigh(logits / 2.0, indices);
  }
};

Tensor mean_square(const nn::LossInputs& inputs) {
  return torchmoe::mean_over_tokens(inputs.logits.square(), inputs.token_mask).mean();
}

Tensor noise_energy(const nn::LossInputs& inputs) {
  const auto noise = inputs.logits - inputs.clean_logits;
  return torchmoe::mean_over_tokens(noise.square(), inputs.token_mask).mean() +
         inputs.weights.mean() * inputs.noise_deviation.value_or(0.0);
}

// ---- settings ------------------------------------------------------------------------------------

nn::Gate gate_of(const Fields& config) {
  nn::Gate gate;
  gate.score_function(config.get<std::string>("score_function"))
      .normalize(config.find<std::string>("normalize"))
      .num_groups(config.get<int64_t>("num_groups"))
      .top_groups(config.get<int64_t>("top_groups"));
  const auto estimator = config.get<std::string>("estimator");
  if (estimator == "temperature") {
    return gate.estimator(std::make_shared<Temperature>());
  }
  return gate.estimator(estimator);
}

nn::Capacity capacity_of(const Fields& fields) {
  nn::Capacity capacity(fields.get<double>("factor"));
  capacity.eval_factor(fields.find<double>("eval_factor"))
      .minimum(fields.get<int64_t>("minimum"))
      .order(fields.get<std::string>("order"))
      .overflow(fields.get<std::string>("overflow"))
      .normalize(fields.get<std::string>("normalize"))
      .priority(fields.find<std::string>("priority"))
      .rounding(fields.get<std::string>("rounding"))
      .dynamic(fields.get<bool>("dynamic"));
  if (fields.has("backup")) {
    capacity.backup(fields.list("backup"));
  }
  return capacity;
}

nn::Balance balance_of(const Fields& fields) {
  nn::Balance balance(fields.get<double>("weight"));
  balance.z_loss_weight(fields.get<double>("z_loss_weight"))
      .fraction_from(fields.get<std::string>("fraction_from"))
      .fraction_choices(fields.get<std::string>("fraction_choices"))
      .selection_bias_rate(fields.get<double>("selection_bias_rate"))
      .selection_bias_centred(fields.get<bool>("selection_bias_centred"));
  std::vector<nn::LossTerm> losses;
  if (const auto weight = fields.find<double>("mean_square")) {
    losses.push_back({"mean_square", mean_square, *weight});
  }
  if (const auto weight = fields.find<double>("noise_energy")) {
    losses.push_back({"noise_energy", noise_energy, *weight});
  }
  return balance.losses(losses);
}

nn::Assistance assistance_of(const Fields& fields) {
  return nn::Assistance(fields.list("backup"))
      .threshold(fields.find<double>("threshold"))
      .lower_threshold(fields.find<double>("lower_threshold"))
      .patience(fields.get<int64_t>("patience"));
}

nn::RouterChoice router_of(const Fields& fields, int64_t hidden_size, int64_t num_experts) {
  if (fields.get<bool>("linear")) {
    return nn::TokenFunction(torch::nn::Linear(
        torch::nn::LinearOptions(hidden_size, num_experts).bias(fields.get<bool>("bias"))));
  }
  // A module, drawn where Python draws it: before the layer.
  return nn::TokenFunction(nn::Router(nn::RouterOptions(hidden_size, num_experts)
                                          .bias(fields.get<bool>("bias"))
                                          .input_jitter(fields.get<double>("input_jitter"))
                                          .logit_noise(fields.get<double>("logit_noise"))
                                          .usage_scaling(fields.get<bool>("usage_scaling"))
                                          .track_usage(fields.get<bool>("track_usage"))));
}

nn::MoEOptions options_of(const Fields& config) {
  const auto hidden_size = config.get<int64_t>("hidden_size");
  const auto num_experts = config.get<int64_t>("num_experts");
  nn::MoEOptions options(hidden_size,
                         config.find<int64_t>("intermediate_size"),
                         num_experts,
                         config.get<int64_t>("top_k"));
  options.activation(config.get<std::string>("activation"))
      .bias(config.get<bool>("bias"))
      .gate(gate_of(config))
      .balance(balance_of(Fields(config.at("balance"))))
      .routed_scaling_factor(config.get<double>("routed_scaling_factor"));
  if (const auto capacity = config.fields("capacity")) {
    options.capacity(capacity_of(*capacity));
  }
  if (const auto assistance = config.fields("assistance")) {
    options.assistance(assistance_of(*assistance));
  }
  if (const auto router = config.fields("router")) {
    options.router(router_of(*router, hidden_size, num_experts));
  }
  if (config.get<bool>("own_experts")) {
    options.experts(Scales(num_experts, hidden_size));
  }
  if (const auto shared = config.fields("shared_experts")) {
    options.shared_experts(nn::SharedExperts(
        nn::SharedExpertsOptions(hidden_size, shared->get<int64_t>("intermediate_size"))
            .activation(shared->get<std::string>("activation"))
            .bias(shared->get<bool>("bias"))));
  }
  return options;
}

// ---- a run ---------------------------------------------------------------------------------------

class Results {
 public:
  void put(const std::string& name, const Tensor& value) {
    if (value.defined()) {
      entries.insert(name, value.detach().clone().contiguous());
    }
  }

  c10::Dict<std::string, Tensor> entries;
};

void put_output(Results& results, const std::string& prefix, const nn::MoEOutput& output) {
  const auto& routing = output.routing;
  results.put(prefix + "hidden_states", output.hidden_states);
  results.put(prefix + "aux_loss", output.aux_loss);
  results.put(prefix + "logits", routing.logits);
  results.put(prefix + "weights", routing.weights);
  results.put(prefix + "selected", routing.selected);
  results.put(prefix + "indices", routing.indices);
  results.put(prefix + "tokens_per_expert", routing.tokens_per_expert);
  results.put(prefix + "kept_per_expert", routing.kept_per_expert);
  for (const auto& [name, loss] : routing.losses) {
    results.put(prefix + "losses." + name, loss);
  }
}

void load_state(nn::MoE& moe, const c10::IValue& state) {
  torchmoe::StateDict tensors;
  for (const auto& entry : state.toGenericDict()) {
    tensors.insert(entry.key().toStringRef(), entry.value().toTensor());
  }
  torchmoe::load_state_dict(*moe, tensors);
}

void run(const Fields& request, const std::string& prefix, Results& results) {
  const Fields config(request.at("config"));
  const auto seed = static_cast<uint64_t>(request.get<int64_t>("seed"));
  torch::manual_seed(seed);
  nn::MoE moe(options_of(config));
  moe->to(request.get<Tensor>("dtype").scalar_type());
  if (request.has("state")) {
    load_state(moe, request.at("state"));
  }
  const auto files = request.fields("files");
  if (files) {
    torchmoe::load_state_dict(*moe, torchmoe::read_state_dict(files->get<std::string>("read")));
  }
  for (const auto& entry : torchmoe::state_dict(*moe)) {
    results.put(prefix + "first." + entry.key(), entry.value());
  }
  std::optional<nn::MoEOutput> seen;
  nn::WithAttachedLoss attached(moe, 0.5);
  attached->on_output = [&](const nn::MoEOutput& output) { seen = output; };
  const bool attaches = config.get<bool>("attached");
  const bool adds_earlier = config.get<bool>("earlier_counts");

  torch::manual_seed(seed);
  const auto pass = [&](const Fields& batch, const std::string& name, const Tensor& earlier) {
    const auto x = batch.get<Tensor>("x").detach().requires_grad_();
    const auto mask = batch.find<Tensor>("token_mask").value_or(Tensor());
    const auto grad = batch.get<Tensor>("grad");
    if (attaches) {
      attached(x, mask, earlier).backward(grad);
    } else {
      seen = moe(x, mask, earlier);
      torch::autograd::backward({seen->hidden_states, seen->aux_loss}, {grad, Tensor()});
    }
    put_output(results, name, *seen);
    results.put(name + "gradients.x", x.grad());
    return seen->routing;
  };
  size_t s = 0;
  for (const auto& step : request.at("steps").toListRef()) {
    const auto place = prefix + "step" + std::to_string(s++) + ".";
    std::vector<nn::Routing> routings;
    Tensor earlier;
    moe->zero_grad();
    for (const auto& batch : step.toListRef()) {
      const auto name = place + "batch" + std::to_string(routings.size()) + ".";
      routings.push_back(pass(Fields(batch), name, earlier));
      if (adds_earlier) {
        const auto& counts = routings.back().tokens_per_expert;
        earlier = earlier.defined() ? earlier + counts : counts;
      }
    }
    const torch::NoGradGuard no_grad;
    for (const auto& parameter : moe->named_parameters()) {
      results.put(place + "gradients." + parameter.key(), parameter->grad());
      if (parameter->grad().defined()) {
        parameter->sub_(0.125 * parameter->grad());
      }
    }
    moe->update(routings);
  }
  moe->eval();
  const auto& last = request.at("steps").toListRef().back().toListRef().back();
  {
    const torch::NoGradGuard no_grad;
    put_output(results, prefix + "eval.", moe(Fields(last).get<Tensor>("x")));
  }
  const auto last_state = torchmoe::state_dict(*moe);
  for (const auto& entry : last_state) {
    results.put(prefix + "state." + entry.key(), entry.value());
  }
  if (files) {
    torchmoe::write_state_dict(last_state, files->get<std::string>("write"));
  }
}

c10::Dict<std::string, Tensor> run_all(const Fields& request) {
  at::set_num_threads(static_cast<int>(request.get<int64_t>("threads")));
  Results results;
  size_t i = 0;
  for (const auto& one : request.at("cases").toListRef()) {
    const auto prefix = std::to_string(i++) + ".";
    try {
      run(Fields(one), prefix, results);
    } catch (const c10::Error& error) {
      const std::string message = error.what_without_backtrace();
      results.put(
          prefix + "error",
          torch::tensor(std::vector<uint8_t>(message.begin(), message.end()), torch::kUInt8));
    }
  }
  return results.entries;
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
    write(argv[2], torch::pickle_save(run_all(Fields(torch::pickle_load(read(argv[1]))))));
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
