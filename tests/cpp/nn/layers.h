// Small layers, and custom parts, that several tests of this room use.
#pragma once

#include <cstdint>
#include <vector>

#include "catch2.h"
#include "nn/moe.h"
#include "support.h"

namespace torchmoe::test {

// Hidden size 6, 4 experts of which a token gets 2.
inline nn::MoEOptions sizes() {
  return {6, 5, 4, 2};
}

inline Tensor tokens(int64_t count = 12, double phase = 0) {
  return wave({count, 6}, phase, 1, torch::kFloat32);
}

inline nn::Routing routing_of(const std::vector<int64_t>& counts) {
  nn::Routing routing;
  routing.tokens_per_expert = torch::tensor(counts, torch::kLong);
  return routing;
}

inline const Tensor& usage_of(const nn::MoE& moe) {
  return moe->router().as<nn::RouterImpl>()->usage;
}

// A router of two layers.
struct DeepRouterImpl : torch::nn::Cloneable<DeepRouterImpl> {
  DeepRouterImpl() { reset(); }
  void reset() override {
    inner = register_module("inner", torch::nn::Linear(6, 8));
    outer = register_module("outer", torch::nn::Linear(8, 4));
  }
  Tensor forward(const Tensor& x) { return outer(torch::tanh(inner(x))); }

  torch::nn::Linear inner{nullptr}, outer{nullptr};
};
TORCH_MODULE(DeepRouter);

// Experts that are matrices.
struct MatricesImpl : torch::nn::Cloneable<MatricesImpl> {
  MatricesImpl() { reset(); }
  void reset() override {
    matrices = register_parameter("matrices", wave({4, 6, 6}, 0, 1, torch::kFloat32));
  }
  Tensor forward(const Tensor& x, const Tensor& indices, const Tensor& weights) {
    const auto all = torch::einsum("th,eoh->teo", {x, matrices});
    const auto used = torch::zeros({x.size(0), 5}, weights.options())
                          .scatter_add(1, torch::where(indices.ge(0), indices, 4), weights);
    return torch::einsum("te,teo->to", {used.narrow(1, 0, 4).to(x.scalar_type()), all});
  }

  Tensor matrices;
};
TORCH_MODULE(Matrices);

}  // namespace torchmoe::test
