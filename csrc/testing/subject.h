// A layer under test: its outputs, its gradients, and its parameters moved and put back.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include "certificate.h"
#include "tensors.h"
#include "types.h"

namespace torchmoe::testing::detail {

// Restores a tensor's values when it is destroyed.
class Restored {
 public:
  explicit Restored(const at::Tensor& tensor)
      : tensor_(tensor.detach()), before_(tensor.detach().clone()) {}
  ~Restored() {
    at::NoGradGuard no_grad;
    tensor_.copy_(before_);
  }
  Restored(const Restored&) = delete;
  Restored& operator=(const Restored&) = delete;
  Restored(Restored&&) = delete;
  Restored& operator=(Restored&&) = delete;

 private:
  at::Tensor tensor_, before_;
};

// The gradients of one backward pass, that of x first; zeros where the graph has none.
using Gradients = Tensors;

class Subject {
 public:
  Subject(const Layer& layer, const GradcheckOptions& options) : layer_(layer), options_(options) {
    for (const auto& [name, parameter] : layer.parameters) {
      TORCH_CHECK(parameter.scalar_type() == at::kDouble && parameter.is_leaf(),
                  "certify: parameters must be float64 leaves, got ",
                  parameter.scalar_type(),
                  parameter.is_leaf() ? "" : " computed from other tensors",
                  " for ",
                  name);
    }
    for (const auto& name : layer.by_expert) {
      parameter(name);
    }
  }

  const Layer& layer() const { return layer_; }
  double eps() const { return options_.eps; }

  // y, then the losses.
  Tensors outputs(const at::Tensor& x, const at::Tensor& token_mask = {}) const {
    auto outputs = layer_.forward(x, token_mask);
    if (outputs.empty() || outputs[0].sizes() != x.sizes() ||
        outputs[0].scalar_type() != at::kDouble) {
      fault("y must be float64 of x's shape ", x.sizes(), ", got ", described(outputs));
    }
    return outputs;
  }

  at::Tensor y(const at::Tensor& x, const at::Tensor& token_mask = {}) const {
    at::NoGradGuard no_grad;
    return outputs(x.detach(), token_mask)[0];
  }

  // What the gradients are of: the outputs, each weighted with different values.
  static Tensors weights_of(const Tensors& outputs) {
    Tensors weights;
    for (const auto& output : outputs) {
      weights.push_back(cotangent_of(output.detach()));
    }
    return weights;
  }

  // What the gradients at x are declared to be the derivative of.
  std::function<Tensors(const at::Tensor& x)> differentiated(const at::Tensor& x) const {
    if (layer_.surrogate) {
      at::NoGradGuard no_grad;
      return layer_.surrogate(x.detach().clone());
    }
    return [this](const at::Tensor& tokens) { return outputs(tokens); };
  }

  static double weighted_sum(const Tensors& outputs, const Tensors& weights) {
    if (outputs.size() != weights.size()) {
      fault("surrogate must return as many tensors as forward, ",
            weights.size(),
            ", got ",
            outputs.size());
    }
    double sum = 0;
    for (size_t o = 0; o < outputs.size(); ++o) {
      sum += (outputs[o] * weights[o]).sum().item<double>();
    }
    return sum;
  }

  // `leaf` is the x that `outputs` were made of.
  Gradients gradients(const Tensors& outputs,
                      const at::Tensor& leaf,
                      const Tensors& weights,
                      bool create_graph = false) const {
    Tensors from, with, leaves;
    for (size_t o = 0; o < outputs.size(); ++o) {
      if (outputs[o].requires_grad() && weights[o].defined()) {
        from.push_back(outputs[o]);
        with.push_back(weights[o]);
      }
    }
    const auto variables = this->variables(leaf);
    for (const auto& variable : variables) {
      if (variable.requires_grad()) {
        leaves.push_back(variable);
      }
    }
    Tensors found(leaves.size());
    if (!from.empty() && !leaves.empty()) {
      found = torch::autograd::grad(
          from, leaves, with, /*retain_graph=*/true, create_graph, /*allow_unused=*/true);
    }
    Gradients gradients;
    size_t next = 0;
    for (const auto& variable : variables) {
      const auto gradient = variable.requires_grad() ? found[next++] : at::Tensor();
      gradients.push_back(gradient.defined() ? gradient : at::zeros_like(variable).detach());
    }
    return gradients;
  }

  Gradients gradients(const at::Tensor& x, const at::Tensor& token_mask = {}) const {
    const auto leaf = leaf_of(x);
    const auto outputs = this->outputs(leaf, token_mask);
    return gradients(outputs, leaf, weights_of(outputs));
  }

  static at::Tensor leaf_of(const at::Tensor& x) { return x.detach().clone().requires_grad_(); }

  // What is differentiated by: x, then the parameters. name() has the name of each.
  Tensors variables(const at::Tensor& x) const {
    Tensors variables{x};
    for (const auto& [name, parameter] : layer_.parameters) {
      variables.push_back(parameter);
    }
    return variables;
  }
  std::string name(size_t variable) const {
    return variable == 0 ? "x" : layer_.parameters[variable - 1].first;
  }

  at::Tensor parameter(const std::string& name) const {
    for (const auto& [own, parameter] : layer_.parameters) {
      if (own == name) {
        return parameter;
      }
    }
    TORCH_CHECK(false, "certify: by_expert must name parameters, got ", name);
  }

  at::Tensor selection(const at::Tensor& x) const {
    at::NoGradGuard no_grad;
    return layer_.selection ? layer_.selection(x.detach()).clone() : at::Tensor();
  }

  void expect_close(const at::Tensor& got,
                    const at::Tensor& expected,
                    const std::string& what) const {
    // NaN compares false, so that it never passes.
    const auto error = (got - expected).abs();
    const auto wrong =
        error.le(options_.atol + options_.rtol * expected.abs()).logical_not_().reshape({-1});
    if (!wrong.any().item<bool>()) {
      return;
    }
    const auto worst =
        at::where(wrong, error.reshape({-1}).nan_to_num(INFINITY), -1.0).argmax().item<int64_t>();
    fault(what,
          " at ",
          at::IntArrayRef(entry_of(worst, got.sizes())),
          " must be ",
          expected.reshape({-1})[worst].item<double>(),
          ", got ",
          got.reshape({-1})[worst].item<double>());
  }

  void expect_close(const Gradients& got, const Gradients& expected, const std::string& how) const {
    for (size_t v = 0; v < got.size(); ++v) {
      expect_close(got[v].detach(), expected[v].detach(), "the gradient of " + name(v) + how);
    }
  }

 private:
  static std::string described(const Tensors& outputs) {
    std::ostringstream text;
    if (outputs.empty()) {
      return "nothing";
    }
    text << outputs[0].scalar_type() << " of shape " << outputs[0].sizes();
    return text.str();
  }

  Layer layer_;
  GradcheckOptions options_;
};

}  // namespace torchmoe::testing::detail
