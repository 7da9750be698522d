#include "autograd/vjp.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

namespace torchmoe {

using torch::autograd::variable_list;

namespace {

/// A tensor to differentiate by: the same elements and tangent, and part of the graph that `tensor`
/// is part of. A detached one would lose both.
at::Tensor variable_for(const at::Tensor& tensor) {
  auto variable = tensor.view_as(tensor);
  return variable.requires_grad() ? variable : variable.set_requires_grad(true);
}

}  // namespace

variable_list vjp(const Composition& composition,
                  const variable_list& inputs,
                  const std::vector<bool>& wanted,
                  const variable_list& arriving) {
  const bool differentiable = at::GradMode::is_enabled();
  const at::AutoGradMode recording(true);
  variable_list given = inputs;
  variable_list variables;
  for (size_t i = 0; i < given.size(); ++i) {
    if (wanted[i] && given[i].defined()) {
      given[i] = variable_for(given[i]);
      variables.push_back(given[i]);
    }
  }
  const auto results = composition(given);
  variable_list outputs;
  variable_list grads;
  for (size_t i = 0; i < results.size(); ++i) {
    if (arriving[i].defined() && results[i].defined() && results[i].requires_grad()) {
      outputs.push_back(results[i]);
      grads.push_back(arriving[i]);
    }
  }
  variable_list gradients(given.size());
  if (outputs.empty() || variables.empty()) {
    return gradients;
  }
  const auto found = torch::autograd::grad(outputs,
                                           variables,
                                           grads,
                                           /*retain_graph=*/differentiable,
                                           /*create_graph=*/differentiable,
                                           /*allow_unused=*/true);
  auto next = found.begin();
  for (size_t i = 0; i < given.size(); ++i) {
    if (wanted[i] && given[i].defined()) {
      gradients[i] = *next++;
    }
  }
  return gradients;
}

}  // namespace torchmoe
