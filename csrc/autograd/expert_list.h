// The experts' parameters among the tensors that a composition is differentiated by.
#pragma once

#include <torch/csrc/autograd/variable.h>

#include "common/tensors.h"
#include "ops/expert_parameters.h"

namespace torchmoe {

/// `first` and the parameters, an absent bias undefined.
inline torch::autograd::variable_list with_experts(std::initializer_list<at::Tensor> first,
                                                   const ExpertParameters& experts) {
  torch::autograd::variable_list list(first);
  for (const auto& parameter :
       {std::optional(experts.w_in), experts.b_in, std::optional(experts.w_out), experts.b_out}) {
    list.push_back(parameter.value_or(at::Tensor()));
  }
  return list;
}

/// The parameters from list[place] on.
inline ExpertParameters experts_from(const torch::autograd::variable_list& list, size_t place) {
  return {list[place], if_defined(list[place + 1]), list[place + 2], if_defined(list[place + 3])};
}

}  // namespace torchmoe
