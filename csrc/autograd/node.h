// Nodes of the autograd graph, made as torch's own ops make theirs: the transforms of torch.func,
// which refuse a torch::autograd::Function, go through them.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "common/find_op.h"

namespace torchmoe {

using torch::autograd::variable_list;

/// What reaches a node in the backward pass.
struct Arriving {
  /// The gradient of each output, undefined for an output that nothing depends on; at least one is
  /// defined.
  variable_list grads;
  /// Whether the gradient of each input is required.
  std::vector<bool> wanted;
};

/// How a node keeps an argument of its backward function. Tensors are torch's to keep: its
/// SavedVariable knows hooks, versions, and graphs whose buffers are freed.
template <typename T>
struct Kept {
  using Type = T;
  static Type keep(const T& value) { return value; }
  static T give(const Type& kept) { return kept; }
};

template <>
struct Kept<at::Tensor> {
  using Type = torch::autograd::SavedVariable;
  static Type keep(const at::Tensor& tensor) { return {tensor, /*is_output=*/false}; }
  static at::Tensor give(const Type& kept) { return kept.unpack(); }
};

template <>
struct Kept<std::optional<at::Tensor>> {
  using Type = torch::autograd::SavedVariable;
  static Type keep(const std::optional<at::Tensor>& tensor) { return {tensor, false}; }
  static std::optional<at::Tensor> give(const Type& kept) {
    auto tensor = kept.unpack();
    return tensor.defined() ? std::optional(std::move(tensor)) : std::nullopt;
  }
};

template <>
struct Kept<std::string_view> {
  using Type = std::string;
  static Type keep(std::string_view text) { return Type(text); }
  static std::string give(const Type& kept) { return kept; }
};

/// The arguments of a backward function after `arriving`, with records spread out.
template <typename Fields>
struct SavedFields;

template <typename... Fields>
struct SavedFields<std::tuple<Fields...>> {
  template <typename Field>
  using KeptOf = Kept<std::remove_cvref_t<Field>>;
  template <typename Field>
  using Value = decltype(KeptOf<Field>::give(std::declval<const typename KeptOf<Field>::Type&>()));

  using Keeping = std::tuple<typename KeptOf<Fields>::Type...>;
  using Values = std::tuple<Value<Fields>...>;

  static Keeping keep(const std::remove_cvref_t<Fields>&... fields) {
    return Keeping(KeptOf<Fields>::keep(fields)...);
  }

  static Values give(const Keeping& keeping) {
    return std::apply([](const auto&... kept) { return Values(KeptOf<Fields>::give(kept)...); },
                      keeping);
  }

  static Values unpack(torch::dynamo::autograd::PackedArgs& packed) {
    return Values{packed.unpack<Value<Fields>>()...};
  }
};

/// The gradient as a node returns it: undefined if output_mask left it out.
inline at::Tensor gradient_if(bool wanted, const at::Tensor& gradient) {
  return wanted ? gradient : at::Tensor();
}

/// A node whose gradients are those of `backward(arriving, saved...)`, one for each input.
template <auto backward>
class OpNode;

template <typename... Saved, variable_list (*backward)(const Arriving&, Saved...)>
class OpNode<backward> final : public torch::autograd::Node {
  using Function = Spread<variable_list(const Arriving&, Saved...)>;
  using Fields = SavedFields<typename Spread<variable_list(Saved...)>::Fields>;
  using Keeping = typename Fields::Keeping;
  using Values = typename Fields::Values;

 public:
  template <typename... Given>
  explicit OpNode(std::string op, const Given&... saved)
      : op_(std::move(op)),
        keeping_(std::apply([](const auto&... fields) { return Fields::keep(fields...); },
                            std::tuple_cat(fields_of(saved)...))) {}

  std::string name() const override { return "torchmoe::" + op_ + "_backward"; }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    for_each([](auto& kept) {
      if constexpr (is_tensor<decltype(kept)>) {
        kept.reset_data();
      }
    });
  }

  // Compiled autograd asks a node what it keeps, and has it call its backward function through
  // Python, with graph inputs in the place of tensors.

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    std::apply([&](const auto&... kept) { (collect(args, kept), ...); }, keeping_);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    namespace dynamo = torch::dynamo::autograd;
    for_each([&](auto& kept) { saved.before(kept); });
    dynamo::PackedArgs packed;
    packed.pack(wanted());
    std::apply([&](const auto&... value) { (packed.pack(value), ...); }, Fields::give(keeping_));
    const auto& given = packed.vec();
    std::vector<at::TypePtr> schema;
    schema.reserve(given.size());
    for (const auto& value : given) {
      schema.push_back(value.isTensor() ? at::TypePtr(at::TensorType::get()) : value.type());
    }
    using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
    const auto metadata =
        dynamo::IValuePacker<Metadata>::pack(dynamo::get_input_metadata(next_edges()));
    const auto& python = dynamo::getPyCompilerInterface();
    const auto function = python->bind_function(saved.get_py_compiler(),
                                                name(),
                                                &call_from_python,
                                                schema,
                                                /*is_custom_function=*/true,
                                                /*is_traceable=*/true);
    auto results = python->call_function(
        saved.get_py_compiler(), "apply_functional", function, grads, given, metadata);
    for_each([&](auto& kept) { saved.after(kept); });
    return results;
  }

 private:
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard lock(mutex_);
    return call({std::move(grads), wanted()}, Fields::give(keeping_));
  }

  static variable_list call(const Arriving& arriving, const Values& values) {
    const auto is_defined = [](const at::Tensor& grad) { return grad.defined(); };
    if (std::none_of(arriving.grads.begin(), arriving.grads.end(), is_defined)) {
      return variable_list(arriving.wanted.size());
    }
    return std::apply(
        [&](const auto&... value) {
          using Flat = typename Function::template FunctionOf<typename Function::Fields>;
          return Flat::template call<backward>(arriving, value...);
        },
        values);
  }

  static variable_list call_from_python(const variable_list& grads,
                                        const std::vector<at::IValue>& given) {
    torch::dynamo::autograd::PackedArgs packed(given);
    auto wanted = packed.unpack<std::vector<bool>>();
    return call({grads, std::move(wanted)}, Fields::unpack(packed));
  }

  std::vector<bool> wanted() const {
    std::vector<bool> wanted;
    wanted.reserve(num_outputs());
    for (uint32_t i = 0; i < num_outputs(); ++i) {
      wanted.push_back(task_should_compute_output(i));
    }
    return wanted;
  }

  template <typename T>
  static constexpr bool is_tensor =
      std::is_same_v<std::remove_cvref_t<T>, torch::autograd::SavedVariable>;

  template <typename T>
  static void collect(torch::dynamo::autograd::CompiledNodeArgs& args, const T& kept) {
    if constexpr (is_tensor<T>) {
      args.collect(kept, /*is_output=*/false);
    } else {
      args.collect(kept);
    }
  }

  template <typename Body>
  void for_each(const Body& body) {
    std::apply([&](auto&... kept) { (body(kept), ...); }, keeping_);
  }

  std::string op_;
  Keeping keeping_;
};

/// A node in the pointer that this torch keeps nodes in.
template <typename T, typename... Given>
auto make_node(const Given&... given) {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    // Found by the type of its argument, since only such a torch declares it.
    return Pointer(new T(given...), [](auto* node) { deleteNode(node); });
  } else {
    return Pointer(c10::make_intrusive<T>(given...));
  }
}

/// Whether an op records a node: gradients are on and an input requires one. The fields of records
/// count one by one.
template <typename... Inputs>
bool wants_gradient(const Inputs&... inputs) {
  return std::apply(
      [](const auto&... fields) { return torch::autograd::compute_requires_grad(fields...); },
      std::tuple_cat(fields_of(inputs)...));
}

/// Records a node for new outputs of `op` if an input requires a gradient. `inputs` ties what
/// `backward` returns gradients for, in order; records among them count field by field.
template <auto backward, typename... Inputs, typename... Saved>
void record_node(const char* op,
                 const variable_list& outputs,
                 const std::tuple<const Inputs&...>& inputs,
                 const Saved&... saved) {
  const auto fields =
      std::apply([](const auto&... input) { return std::tuple_cat(fields_of(input)...); }, inputs);
  if (!std::apply([](const auto&... field) { return wants_gradient(field...); }, fields)) {
    return;
  }
  const auto node = make_node<OpNode<backward>>(std::string(op), saved...);
  node->set_next_edges(std::apply(
      [](const auto&... field) { return torch::autograd::collect_next_edges(field...); }, fields));
  for (const auto& output : outputs) {
    torch::autograd::set_history(output, node);
  }
}

/// The result of `op`, a lambda, run below autograd.
template <typename Op>
auto below_autograd(const Op& op) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op();
}

}  // namespace torchmoe
