// The refusal of forward-mode derivatives, which no op has.
#pragma once

#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "common/record.h"

namespace torchmoe {

/// Raises a sentence naming the op where an input carries a tangent. An autograd kernel calls it
/// first: where it then goes on below autograd, the tangent would be lost without a word, and
/// torch's own refusal of a Function names nothing.
template <typename... Inputs>
void refuse_tangents(std::string_view op, const Inputs&... inputs) {
  constexpr uint64_t kLevel = 0;  // torch has no other
  const auto has_tangent = [](const std::optional<at::Tensor>& input) {
    return input && input->defined() && input->_fw_grad(kLevel).defined();
  };
  const auto any_has_tangent = [&](const auto&... tensors) {
    return (has_tangent(tensors) || ...);
  };
  TORCH_CHECK_NOT_IMPLEMENTED(
      !std::apply(any_has_tangent, std::tuple_cat(fields_of(inputs)...)),
      op,
      ": forward-mode derivatives must not be requested, got an input with a tangent; use reverse "
      "mode, torch.autograd.grad");
}

}  // namespace torchmoe
