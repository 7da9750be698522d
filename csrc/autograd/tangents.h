// Forward-mode derivatives: what a tensor's tangent is, and how an op's result gets one.
#pragma once

#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "common/record.h"

namespace torchmoe {

inline constexpr uint64_t kForwardLevel = 0;  // torch has no other

/// Whether an input carries a tangent; the fields of records count one by one.
template <typename... Inputs>
bool has_tangent(const Inputs&... inputs) {
  return std::apply(
      [](const auto&... fields) { return (torch::autograd::isFwGradDefined(fields) || ...); },
      std::tuple_cat(fields_of(inputs)...));
}

/// The tangent, undefined where there is none.
inline at::Tensor tangent_of(const at::Tensor& dual) {
  return dual.defined() ? dual._fw_grad(kForwardLevel) : at::Tensor();
}

inline std::optional<at::Tensor> tangent_of(const std::optional<at::Tensor>& dual) {
  const auto tangent = dual ? tangent_of(*dual) : at::Tensor();
  return tangent.defined() ? std::optional(tangent) : std::nullopt;
}

/// The tensor without its tangent, for the factors of a product rule.
inline at::Tensor primal_of(const at::Tensor& dual) {
  return dual._fw_primal(kForwardLevel);
}

inline std::optional<at::Tensor> primal_of(const std::optional<at::Tensor>& dual) {
  return dual ? std::optional(primal_of(*dual)) : std::nullopt;
}

/// Gives a new result its tangent; does nothing if that is undefined, which means zero.
inline void set_tangent(const at::Tensor& result, const at::Tensor& tangent) {
  if (tangent.defined()) {
    result._set_fw_grad(tangent, kForwardLevel, /*is_inplace_op=*/false);
  }
}

/// Adds a term of a product rule; a sum without terms is undefined, which means zero.
inline void add_term(at::Tensor& sum, const at::Tensor& term) {
  sum = sum.defined() ? at::add(sum, term) : term;
}

}  // namespace torchmoe
