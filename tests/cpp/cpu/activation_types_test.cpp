// A block of the activations in every type, forward and backward, against torch's own functions.
#include <string>
#include <vector>

#include "cpu/activation_block.h"
#include "cpu/matrices.h"
#include "ops/expert_activation.h"
#include "reference.h"
#include "simd/memory.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using namespace torchmoe::cpu;   // NOLINT(google-build-using-namespace): what they are about
using torchmoe::ChosenActivation;

namespace {

template <typename T>
constexpr at::ScalarType type_of = c10::CppTypeToScalarType<T>::value;

/// Both directions of a block in T with arithmetic in Acc, all results in one tensor.
template <typename T, typename Acc>
Tensor block_results(const ChosenActivation& activation, const Tensor& us) {
  const int64_t rows = us.size(0), columns = us.size(1);
  const bool gated = activation.is_gated();
  const auto acc = type_of<Acc>, type = type_of<T>;
  const Tensor gate = us.to(acc), up = wave(us.sizes(), 1, 3, acc);
  const Tensor gate_bias = wave({columns}, 2, 1, type), up_bias = wave({columns}, 3, 1, type);
  const Written<T> pre_gate(rows, columns, columns), pre_up(rows, columns, columns);
  const Written<T> act(rows, columns, columns), weighted(rows, columns, columns);
  const Written<T> grad_gate(rows, columns, columns), grad_up(rows, columns, columns);
  const Written<Acc> dots(rows, 1, 1);
  const Tensor grad = wave(us.sizes(), 4, 1, acc), weights = wave({rows}, 5, 1, acc);
  activate_block<T, Acc>(activation,
                         {rows,
                          columns,
                          gate.const_data_ptr<Acc>(),
                          gated ? up.const_data_ptr<Acc>() : nullptr,
                          columns,
                          /*step=*/1,
                          gate_bias.const_data_ptr<T>(),
                          gated ? up_bias.const_data_ptr<T>() : nullptr,
                          pre_gate.data(),
                          gated ? pre_up.data() : nullptr,
                          columns,
                          act.data(),
                          columns});
  activate_block_backward<T, Acc>(activation,
                                  {rows,
                                   columns,
                                   grad.const_data_ptr<Acc>(),
                                   columns,
                                   pre_gate.data(),
                                   gated ? pre_up.data() : nullptr,
                                   columns,
                                   /*step=*/1,
                                   weights.const_data_ptr<Acc>(),
                                   weighted.data(),
                                   columns,
                                   grad_gate.data(),
                                   gated ? grad_up.data() : nullptr,
                                   columns,
                                   dots.data(),
                                   1});
  std::vector<Matrix> all = {
      pre_gate.values(), act.values(), weighted.values(), grad_gate.values(), dots.values()};
  if (gated) {
    all.insert(all.end(), {pre_up.values(), grad_up.values()});
  }
  std::vector<Tensor> flat;
  for (const Matrix& x : all) {
    flat.push_back(tensor_of(x).flatten());
  }
  return torch::cat(flat);
}

/// The same from torch's own functions in float64, the pre-activation rounded to `type`.
Tensor torch_results(const std::string& activation, const Tensor& us, at::ScalarType type) {
  const int64_t rows = us.size(0), columns = us.size(1);
  const bool gated = torchmoe::reference::is_gated(activation);
  const auto stored = [&](const Tensor& x) { return x.to(type).to(torch::kDouble); };
  const auto apply = [&](const Tensor& gate, const Tensor& up) {
    const Tensor value = activation == "relu" || activation == "reglu"    ? gate.relu()
                         : activation == "silu" || activation == "swiglu" ? torch::silu(gate)
                         : activation == "relu2"                          ? gate.relu().square()
                         : activation == "gelu_tanh" || activation == "geglu_tanh"
                             ? torch::gelu(gate, "tanh")
                             : torch::gelu(gate);
    return gated ? value * up : value;
  };
  const Tensor gate = us + stored(wave({columns}, 2)),
               up = wave(us.sizes(), 1, 3) + stored(wave({columns}, 3));
  const Tensor pre_gate = stored(gate).requires_grad_(), pre_up = stored(up).requires_grad_();
  const Tensor act = apply(pre_gate, pre_up);
  const Tensor grad = wave(us.sizes(), 4), weights = wave({rows}, 5).unsqueeze(1);
  act.backward(weights * grad);
  std::vector<Tensor> all = {
      pre_gate, apply(gate, up), weights * act, pre_gate.grad(), (grad * act).sum(1)};
  if (gated) {
    all.insert(all.end(), {pre_up, pre_up.grad()});
  }
  for (Tensor& x : all) {
    x = x.detach().flatten();
  }
  return torch::cat(all);
}

}  // namespace

TEST_CASE("activation: a block of every type", "[cpu][activation]") {
  const Tensor us = wave({5, 37}, 0, 4);
  for (const auto& name : torchmoe::reference::activations()) {
    INFO(name);
    const auto activation = torchmoe::choose_activation("test", name);
    CHECK(difference(block_results<double, double>(activation, us),
                     torch_results(name, us, torch::kDouble),
                     37) == "");
    CHECK(difference(block_results<float, float>(activation, us).to(torch::kFloat),
                     torch_results(name, us, torch::kFloat),
                     37) == "");
    // Each result is rounded to the stored type, and the sums here.
    CHECK(difference(block_results<c10::BFloat16, float>(activation, us).to(torch::kBFloat16),
                     torch_results(name, us, torch::kBFloat16),
                     37,
                     /*rounded=*/epsilon(torch::kBFloat16)) == "");
  }
}
