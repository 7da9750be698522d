// Parts of a layer that may be replaced: a module or a function.
#pragma once

#include <concepts>
#include <functional>
#include <memory>
#include <optional>
#include <type_traits>
#include <typeinfo>
#include <utility>

#include <ATen/core/Tensor.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/pimpl.h>

namespace torchmoe::nn {

/// A module whose `forward` takes tensors and returns one, or any function that does. The layer
/// registers the module, and so trains, saves, moves and clones it; to be cloned it must derive
/// from torch::nn::Cloneable. Copies of a Replaceable share the module, like copies of torch's
/// module holders: give each layer its own. A null or empty one is refused (c10::ValueError).
///
///     options.router(Router(64, 8))                                     // a module
///     options.router(torch::nn::AnyModule(MyRouter(64, 8)))             // the same, of any type
///     options.router([w](const at::Tensor& x) { return x.matmul(w); })  // a function
template <typename... Inputs>
class Replaceable {
  template <typename T>
  static constexpr bool kIsHolder =
      std::is_base_of_v<torch::detail::ModuleHolderIndicator, std::decay_t<T>>;

 public:
  template <typename Impl>
  Replaceable(const torch::nn::ModuleHolder<Impl>& holder)  // NOLINT(google-explicit-constructor)
      : Replaceable(holder.is_empty() ? std::shared_ptr<Impl>() : holder.ptr()) {
    static_assert(
        requires(Impl& module, const Inputs&... inputs) {
          { module.forward(inputs...) } -> std::convertible_to<at::Tensor>;
        }, "forward must take the tensors that the part is called with, and return one");
  }
  template <typename Impl>
    requires std::is_base_of_v<torch::nn::Module, Impl>
  Replaceable(const std::shared_ptr<Impl>& module)  // NOLINT(google-explicit-constructor)
      : Replaceable(any_of(module)) {}
  Replaceable(torch::nn::AnyModule module)  // NOLINT(google-explicit-constructor)
      : Replaceable(std::make_shared<torch::nn::AnyModule>(std::move(module))) {}
  /// A Sequential cannot be an AnyModule, as its forward is a template.
  Replaceable(const torch::nn::Sequential& layers)  // NOLINT(google-explicit-constructor)
    requires(sizeof...(Inputs) == 1)
      : call_([module = layers.ptr()](const Inputs&... inputs) {
          return module->forward(inputs...);
        }),
        module_(layers.ptr()),
        clone_([layers](const auto& device) {
          const auto copy = layers->clone(device);
          return Replaceable(
              torch::nn::Sequential(std::dynamic_pointer_cast<torch::nn::SequentialImpl>(copy)));
        }) {}
  template <typename Function>
    requires(!kIsHolder<Function> && !std::is_same_v<std::decay_t<Function>, Replaceable> &&
             std::is_invocable_r_v<at::Tensor, Function&, const Inputs&...>)
  Replaceable(Function function)  // NOLINT(google-explicit-constructor)
      : call_(std::move(function)) {
    check(call_ != nullptr);
  }

  at::Tensor operator()(const Inputs&... inputs) const { return call_(inputs...); }

  /// Null for a function.
  const std::shared_ptr<torch::nn::Module>& module() const { return module_; }

  /// The module as its own type or a base of it; null if it has another type.
  template <typename Impl>
  Impl* as() const {
    return dynamic_cast<Impl*>(module_.get());
  }

  /// The same, but null also if it is of a class derived from Impl.
  template <typename Impl>
  Impl* exactly() const {
    auto* found = as<Impl>();
    return found != nullptr && typeid(*found) == typeid(Impl) ? found : nullptr;
  }

  /// A Replaceable with a copy of the module; a function is shared.
  Replaceable clone(const std::optional<at::Device>& device = std::nullopt) const {
    return clone_ ? clone_(device) : *this;
  }

 private:
  explicit Replaceable(const std::shared_ptr<torch::nn::AnyModule>& any)
      : call_([any](const Inputs&... inputs) {
          return any->template forward<at::Tensor>(inputs...);
        }),
        clone_([any](const auto& device) { return Replaceable(any->clone(device)); }) {
    check(!any->is_empty() && any->ptr() != nullptr);
    module_ = any->ptr();
  }

  template <typename Impl>
  static torch::nn::AnyModule any_of(const std::shared_ptr<Impl>& module) {
    return module ? torch::nn::AnyModule(module) : torch::nn::AnyModule();
  }

  static void check(bool is_there) {
    TORCH_CHECK_VALUE(is_there, "MoE: a part must be a module or a function, got an empty one");
  }

  std::function<at::Tensor(const Inputs&...)> call_;
  std::shared_ptr<torch::nn::Module> module_;
  std::function<Replaceable(const std::optional<at::Device>&)> clone_;
};

/// x [T, H] -> the logits [T, E] of a router, or the output [T, H] of shared experts.
using TokenFunction = Replaceable<at::Tensor>;

/// x [T, H], indices [T, K] int64, weights [T, K] -> y [T, H], the weighted sum of each token's
/// experts; an id outside [0, E) adds nothing.
using ExpertFunction = Replaceable<at::Tensor, at::Tensor, at::Tensor>;

}  // namespace torchmoe::nn
