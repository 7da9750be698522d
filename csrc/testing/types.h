// What a gradient check is given and what it returns.
#pragma once

#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace torchmoe::testing {

/// What a function takes and returns.
using Tensors = std::vector<at::Tensor>;

/// How a gradient is checked.
struct GradcheckOptions {
  /// The step of the differences.
  double eps = 1e-6;
  /// In float64 a central difference is good to about 1e-10 of the function's size. torch's own
  /// 1e-5 and 1e-3 would let a wrong fourth digit pass.
  double atol = 1e-7;
  double rtol = 1e-5;
  /// Given the inputs, the integers that the function decides by (expert ids [T, K], say), one row
  /// per token. Empty: the function decides nothing.
  std::function<at::Tensor(const Tensors&)> selection = nullptr;
};

/// What a gradient check found.
struct GradcheckResult {
  bool ok = true;
  std::string message;  ///< empty when ok; else the first fault: output, input, entry, both values

  explicit operator bool() const { return ok; }
};

/// Any callable that takes `const std::vector<at::Tensor>&` and returns a tensor, a vector of
/// tensors or a tuple of tensors.
class TensorFunction {
 public:
  template <typename F,
            typename = std::enable_if_t<std::is_invocable_v<F&, const Tensors&> &&
                                        !std::is_same_v<std::decay_t<F>, TensorFunction>>>
  TensorFunction(F function)  // NOLINT(google-explicit-constructor): a lambda is a TensorFunction
      : call_([function = std::move(function)](const Tensors& inputs) mutable -> Tensors {
          using Result = std::invoke_result_t<F&, const Tensors&>;
          if constexpr (std::is_convertible_v<Result, at::Tensor>) {
            return {function(inputs)};
          } else if constexpr (std::is_convertible_v<Result, Tensors>) {
            return function(inputs);
          } else {
            return std::apply([](const auto&... outputs) { return Tensors{outputs...}; },
                              function(inputs));
          }
        }) {}

  Tensors operator()(const Tensors& inputs) const { return call_(inputs); }

 private:
  std::function<Tensors(const Tensors&)> call_;
};

}  // namespace torchmoe::testing
