// Gradients of a composition of differentiable ops: how an op whose backward is fused gets its
// derivatives of higher orders, and those of forward mode over reverse.
#pragma once

#include <functional>
#include <vector>

#include <torch/csrc/autograd/variable.h>

namespace torchmoe {

using Composition =
    std::function<torch::autograd::variable_list(const torch::autograd::variable_list&)>;

/// The required gradients of the inputs of `composition`, for the gradients `arriving` at its
/// outputs, of which some may be undefined; undefined for an input that nothing depends on. They
/// are differentiable themselves where gradients are on, and carry tangents where the inputs do.
///
/// It runs the composition again, so that an op keeps nothing for it.
torch::autograd::variable_list vjp(const Composition& composition,
                                   const torch::autograd::variable_list& inputs,
                                   const std::vector<bool>& wanted,
                                   const torch::autograd::variable_list& arriving);

}  // namespace torchmoe
