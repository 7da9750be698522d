// Gradient checks that need only LibTorch, header only: gradcheck compares finite differences with
// backward; certify, at the end, tests further laws on a layer.
//
//     using torchmoe::testing::gradcheck;
//     auto x = torch::randn({5, 3}, torch::dtype(torch::kFloat64).requires_grad(true));
//
//     gradcheck<MyFunction>({x, weight});                      // a torch::autograd::Function
//     gradcheck([&](const auto& in) { return my_op(in[0], indices); }, {x});       // any callable
//     gradgradcheck<MyFunction>({x, weight});                  // its second derivative
//
//     const auto result = gradcheck<MyFunction>({x, weight});
//     if (!result.ok) std::cerr << result.message << "\n";     // nothing here prints
//
// For an output o and an input x the check compares, entry by entry,
//
//     analytic[j, i] = (backward of the j-th unit vector)[i]            a backward per output entry
//     numeric[j, i]  = (o(x + eps e_i)[j] - o(x - eps e_i)[j]) / (2 eps)  two forwards per x entry
//
// and requires |analytic - numeric| <= atol + rtol |numeric|. It does so with each differentiable
// input alone (the others constant) and with all of them together, because a backward that skips
// gradients that are not needed takes another path each time. It also requires that
//
//   - forward and backward give the same bits twice, and forward also with gradients off;
//   - forward passes that run in between do not affect the backward;
//   - neither inputs nor incoming gradients are written to;
//   - an undefined incoming gradient counts as zero;
//   - an incoming gradient may have any strides;
//   - a discrete selection inside the function, if `selection` is given, is the same at every step:
//     across a tie a finite difference is meaningless, and the message names the token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "testing/certificate.h"
#include "testing/gradcheck.h"
#include "testing/laws.h"
#include "testing/subject.h"
#include "testing/types.h"

namespace torchmoe::testing {

namespace detail {

template <typename Signature>
struct ForwardArguments;
template <typename Result, typename... Arguments>
struct ForwardArguments<Result (*)(torch::autograd::AutogradContext*, Arguments...)>
    : std::integral_constant<size_t, sizeof...(Arguments)> {};

// Function::apply as a callable on a vector; `rest` follows the tensors.
template <typename Function, typename... Rest>
TensorFunction as_tensor_function(const Rest&... rest) {
  constexpr size_t count = ForwardArguments<decltype(&Function::forward)>::value;
  static_assert(count >= sizeof...(Rest), "forward takes fewer arguments than were given");
  return [rest = std::make_tuple(rest...)](const Tensors& inputs) {
    constexpr size_t tensors = count - sizeof...(Rest);
    TORCH_CHECK(inputs.size() == tensors,
                "gradcheck: inputs must be the ",
                tensors,
                " tensors that forward takes first, got ",
                inputs.size());
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return std::apply([&](const auto&... last) { return Function::apply(inputs[I]..., last...); },
                        rest);
    }(std::make_index_sequence<tensors>());
  };
}

}  // namespace detail

/// Compares the gradients of `function` with finite differences at `inputs`.
///
/// - inputs: a tensor that requires grad must be a float64 leaf of any shape and is differentiated;
///   all others (ids, masks, an undefined tensor for an absent argument) are passed on unchanged.
///   They are copied, strides included, and never written to.
/// - outputs: any shapes. Integers are skipped, and so is an output that needs no gradient, unless
///   none does: then all must be constant. The others must be float64.
///
/// Returns the first fault found. Throws c10::Error if `inputs` breaks the contract above;
/// exceptions of the function itself are passed on. Meant for a few hundred entries: it takes 2
/// forwards per input entry, and a backward per output entry for each input alone and for all
/// together.
inline GradcheckResult gradcheck(const TensorFunction& function,
                                 const Tensors& inputs,
                                 const GradcheckOptions& options = {}) {
  return detail::run_gradcheck("gradcheck", function, inputs, options, /*every_output=*/false);
}

/// The same for Function::apply(inputs[0], inputs[1], ..., rest...): the tensors first, then the
/// arguments that are not differentiated (numbers, strings, flags).
template <typename Function, typename... Rest>
GradcheckResult gradcheck(const Tensors& inputs,
                          const GradcheckOptions& options = {},
                          const Rest&... rest) {
  return gradcheck(detail::as_tensor_function<Function>(rest...), inputs, options);
}

/// The same for the gradient, as the function (inputs, incoming gradients) -> gradients of the
/// inputs: in a message `output` counts the inputs that require grad, and `input` counts on from
/// the inputs to the outputs' incoming gradients. A function that refuses double backward throws
/// its own message.
inline GradcheckResult gradgradcheck(const TensorFunction& function,
                                     const Tensors& inputs,
                                     const GradcheckOptions& options = {}) {
  const size_t count = inputs.size();
  Tensors extended = inputs;
  std::vector<size_t> chosen;
  const Tensors outputs = function(inputs);
  for (size_t o = 0; o < outputs.size(); ++o) {
    if (!outputs[o].defined() || !outputs[o].requires_grad()) {
      continue;
    }
    extended.push_back(detail::cotangent_of(outputs[o].detach()).requires_grad_());
    chosen.push_back(o);
  }
  TORCH_CHECK(!chosen.empty(),
              "gradgradcheck: function must have an output that requires grad, got none");

  const auto gradient = [=](const Tensors& in) {
    at::AutoGradMode grad_mode(true);
    Tensors points(in.begin(), in.begin() + static_cast<std::ptrdiff_t>(count)), leaves;
    for (size_t i = 0; i < count; ++i) {
      if (!inputs[i].defined() || !inputs[i].requires_grad()) {
        continue;
      }
      if (!points[i].requires_grad()) {
        points[i] = points[i].detach().requires_grad_();
      }
      leaves.push_back(points[i]);
    }
    const Tensors all = function(points);
    Tensors from;
    for (size_t o : chosen) {
      from.push_back(all.at(o));
    }
    const Tensors cotangents(in.begin() + static_cast<std::ptrdiff_t>(count), in.end());
    Tensors grads = torch::autograd::grad(from,
                                          leaves,
                                          cotangents,
                                          /*retain_graph=*/true,
                                          /*create_graph=*/true,
                                          /*allow_unused=*/true);
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) {
        grads[i] = at::zeros_like(leaves[i]);
      }
    }
    return grads;
  };

  GradcheckOptions extended_options = options;
  if (options.selection) {
    extended_options.selection = [=](const Tensors& in) {
      return options.selection({in.begin(), in.begin() + static_cast<std::ptrdiff_t>(count)});
    };
  }
  return detail::run_gradcheck(
      "gradgradcheck", gradient, extended, extended_options, /*every_output=*/true);
}

template <typename Function, typename... Rest>
GradcheckResult gradgradcheck(const Tensors& inputs,
                              const GradcheckOptions& options = {},
                              const Rest&... rest) {
  return gradgradcheck(detail::as_tensor_function<Function>(rest...), inputs, options);
}

/// Tests the laws of testing/laws.h on a layer, each with the tokens x [T, H] float64. A law that
/// fails is tested again with the first token, the first two, and so on, for the smallest input. An
/// exception from forward is a failure of the law that called it, except that double backward may
/// be refused.
///
///     moe->to(at::kDouble);
///     const auto certificate = certify(
///         {.forward = [&](const auto& x, const auto& mask) -> Tensors {
///            const auto out = moe->forward(x, mask);
///            return {out.hidden_states, out.aux_loss};
///          },
///          .parameters = moe->named_parameters().pairs()},
///         at::randn({9, 8}, at::kDouble));
///     std::cout << certificate.to_string();
///
/// Takes two forward passes for each element of x and of the parameters: for small layers. Throws
/// c10::Error if x or the parameters are not float64.
inline Certificate certify(const Layer& layer,
                           const at::Tensor& x,
                           const GradcheckOptions& options = {}) {
  TORCH_CHECK(x.dim() == 2 && x.size(0) > 0 && x.scalar_type() == at::kDouble,
              "certify: x must be float64 of shape [num_tokens, hidden_size], got ",
              x.scalar_type(),
              " of shape ",
              x.sizes());
  const detail::Subject subject(layer, options);
  Certificate certificate;
  for (const auto& law : detail::laws()) {
    if (const auto reason = law.not_asked(layer)) {
      certificate.not_asked.emplace_back(law.name, *reason);
      continue;
    }
    const auto fails = [&](int64_t num_tokens) -> std::optional<std::string> {
      try {
        law.holds(subject, x.narrow(0, 0, num_tokens));
      } catch (const detail::Fault& fault) {
        return fault.message;
      } catch (const c10::Error& error) {
        return std::string("must not throw, got ") + error.what_without_backtrace();
      } catch (const std::exception& error) {
        return std::string("must not throw, got ") + error.what();
      }
      return std::nullopt;
    };
    auto message = fails(x.size(0));
    if (!message) {
      certificate.held.push_back(law.name);
      continue;
    }
    int64_t num_tokens = x.size(0);
    for (int64_t fewer = 1; fewer < num_tokens; ++fewer) {
      if (const auto smaller = fails(fewer)) {
        message = smaller;
        num_tokens = fewer;
      }
    }
    certificate.failures.push_back({law.name, law.formula, num_tokens, *message, law.usually});
  }
  return certificate;
}

}  // namespace torchmoe::testing
