// The derivatives of an op of one differentiable input with a kernel for the value and one for the
// gradient: higher derivatives come from a composition of differentiable ops with the same value.
#pragma once

#include <tuple>

#include <ATen/ops/zeros_like.h>

#include "autograd/node.h"
#include "autograd/tangents.h"
#include "autograd/vjp.h"

namespace torchmoe {

/// What an Op has, Rest being what follows its differentiable input:
///
///     kName
///     out(input, rest...), gradient(grad, input, rest...)   the op and its backward
///     check, check_gradient                                 of both
///     composition(input, rest...)                           the op, differentiable to any order
template <typename Op, typename... Rest>
class Composed {
 public:
  static at::Tensor out(const at::Tensor& input, Rest... rest) {
    Op::check(input, rest...);
    if (has_tangent(input)) {
      return Op::composition(input, rest...);
    }
    const auto result = below_autograd([&] { return Op::out(input, rest...); });
    record_node<&first>(Op::kName, {result}, std::tie(input), input, rest...);
    return result;
  }

  static at::Tensor gradient(const at::Tensor& grad, const at::Tensor& input, Rest... rest) {
    Op::check_gradient(grad, input, rest...);
    if (has_tangent(grad, input)) {
      return composed_gradient(grad, input, rest...);
    }
    const auto result = below_autograd([&] { return Op::gradient(grad, input, rest...); });
    record_node<&second>(Op::kName, {result}, std::tie(grad, input), grad, input, rest...);
    return result;
  }

 private:
  static at::Tensor composed_gradient(const at::Tensor& grad,
                                      const at::Tensor& input,
                                      Rest... rest) {
    const auto op = [&](const variable_list& inputs) {
      return variable_list{Op::composition(inputs[0], rest...)};
    };
    const auto gradient = vjp(op, {input}, {true}, {grad})[0];
    return gradient.defined() ? gradient : at::zeros_like(input);
  }

  static variable_list first(const Arriving& arriving, const at::Tensor& input, Rest... rest) {
    return {Op::gradient(arriving.grads[0], input, rest...)};
  }

  static variable_list second(const Arriving& arriving,
                              const at::Tensor& grad,
                              const at::Tensor& input,
                              Rest... rest) {
    const auto backward = [&](const variable_list& inputs) {
      return variable_list{composed_gradient(inputs[0], inputs[1], rest...)};
    };
    return vjp(backward, {grad, input}, arriving.wanted, arriving.grads);
  }
};

}  // namespace torchmoe
