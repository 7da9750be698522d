// Parts of a layer that may be replaced: a module or a function.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#include <ATen/core/Tensor.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/pimpl.h>

namespace torchmoe::nn {

/// A module whose `forward` takes tensors and returns one, or any function that does. A module is
/// registered by the layer that takes it, which so learns, saves, moves and clones it; it must derive
/// from torch::nn::Cloneable for the last. Copies of a Replaceable share the module, as copies of
/// torch's module holders do: give each layer one of its own.
///
///     layer.router(Router(64, 8))                                       // a module
///     layer.router(torch::nn::AnyModule(MyRouter(64, 8)))               // the same, of any type
///     layer.router([w](const at::Tensor& x) { return x.matmul(w); })    // a function
template <typename... Inputs>
class Replaceable {
 public:
  template <typename Impl>
  Replaceable(const torch::nn::ModuleHolder<Impl>& holder)  // NOLINT(google-explicit-constructor)
      : Replaceable(torch::nn::AnyModule(holder)) {}
  template <typename Impl, typename = std::enable_if_t<std::is_base_of_v<torch::nn::Module, Impl>>>
  Replaceable(std::shared_ptr<Impl> module)  // NOLINT(google-explicit-constructor)
      : Replaceable(torch::nn::AnyModule(std::move(module))) {}
  Replaceable(torch::nn::AnyModule module)  // NOLINT(google-explicit-constructor)
      : module_(std::make_shared<torch::nn::AnyModule>(std::move(module))) {
    TORCH_CHECK_VALUE(!module_->is_empty(),
                      "MoE: a part must be a module or a function, got an empty AnyModule");
  }
  template <typename Function,
            typename = std::enable_if_t<
                std::is_invocable_r_v<at::Tensor, Function&, const Inputs&...> &&
                !std::is_base_of_v<torch::detail::ModuleHolderIndicator, std::decay_t<Function>> &&
                !std::is_same_v<std::decay_t<Function>, Replaceable>>>
  Replaceable(Function function)  // NOLINT(google-explicit-constructor)
      : function_(std::move(function)) {}

  at::Tensor operator()(const Inputs&... inputs) const {
    return module_ ? module_->template forward<at::Tensor>(inputs...) : function_(inputs...);
  }

  /// Null for a function.
  std::shared_ptr<torch::nn::Module> module() const { return module_ ? module_->ptr() : nullptr; }

  /// The module as what it is, null where it is something else.
  template <typename Impl>
  Impl* as() const {
    return dynamic_cast<Impl*>(module().get());
  }

  /// One with a copy of the module; a function is shared.
  Replaceable clone(const std::optional<at::Device>& device = std::nullopt) const {
    return module_ ? Replaceable(module_->clone(device)) : *this;
  }

 private:
  std::shared_ptr<torch::nn::AnyModule> module_;
  std::function<at::Tensor(const Inputs&...)> function_;
};

/// x [T, H] -> [T, E] for a router, whose logits these are, or [T, H] for shared experts.
using TokenFunction = Replaceable<at::Tensor>;

/// x [T, H], indices [T, K] int64, weights [T, K] -> y [T, H], the weighted sum of each token's
/// experts; an id outside [0, E) adds nothing.
using ExpertFunction = Replaceable<at::Tensor, at::Tensor, at::Tensor>;

}  // namespace torchmoe::nn
