// Connects the library's functions with the dispatcher, which knows no records: functions and
// kernels take records, schemas have their fields.
#pragma once

#include <array>
#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

#include <ATen/core/dispatch/Dispatcher.h>

#include "record.h"

namespace torchmoe {

/// How an op takes an argument: tensors by reference, words and numbers by value.
template <typename T>
using Taken =
    std::conditional_t<std::is_convertible_v<std::remove_cvref_t<T>, std::optional<at::Tensor>>,
                       T,
                       std::remove_cvref_t<T>>;

template <typename Fields>
struct TakenFields;
template <typename... Fields>
struct TakenFields<std::tuple<Fields...>> {
  using Type = std::tuple<Taken<Fields>...>;
};

/// What a schema has for an argument: itself, or the fields of the record, as a tuple.
template <typename T>
struct InSchema {
  using Type = std::tuple<T>;
};
template <Record T>
struct InSchema<T> {
  using Type =
      typename TakenFields<decltype(std::declval<const std::remove_cvref_t<T>&>().fields())>::Type;
};

/// A function's counterpart with every record spread out.
template <typename Function>
struct Spread;

template <typename Result, typename... Arguments>
struct Spread<Result(Arguments...)> {
  using Fields = decltype(std::tuple_cat(std::declval<typename InSchema<Arguments>::Type>()...));

  template <typename Tuple>
  struct FunctionOf;
  template <typename... Types>
  struct FunctionOf<std::tuple<Types...>> {
    using Type = Result(Types...);

    /// Puts the records together and calls the kernel.
    template <Result (*kernel)(Arguments...)>
    static Result call(Types... given) {
      const std::tuple<Types...> all(std::forward<Types>(given)...);
      return call_with<kernel>(all, std::index_sequence_for<Arguments...>());
    }
  };
  using Function = typename FunctionOf<Fields>::Type;

 private:
  /// The place of each argument's first field.
  static constexpr auto kFirst = [] {
    std::array<size_t, sizeof...(Arguments)> first{};
    size_t next = 0;
    size_t i = 0;
    ((first[i++] =
          std::exchange(next, next + std::tuple_size_v<typename InSchema<Arguments>::Type>)),
     ...);
    return first;
  }();

  template <typename Argument, size_t first>
  static decltype(auto) gather(const Fields& all) {
    if constexpr (Record<Argument>) {
      using Type = std::remove_cvref_t<Argument>;
      constexpr auto kSize = std::tuple_size_v<typename InSchema<Argument>::Type>;
      return [&]<size_t... i>(std::index_sequence<i...>) {
        return Type{std::get<first + i>(all)...};
      }(std::make_index_sequence<kSize>());
    } else {
      return std::get<first>(all);
    }
  }

  template <Result (*kernel)(Arguments...), size_t... i>
  static Result call_with(const Fields& all, std::index_sequence<i...>) {
    return kernel(gather<Arguments, kFirst[i]>(all)...);
  }
};

/// The handle of `name` ("torchmoe::permute"), whose schema matches Function with its records spread
/// out; looked up once by each caller.
template <typename Function>
c10::TypedOperatorHandle<typename Spread<Function>::Function> find_op(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<typename Spread<Function>::Function>();
}

/// Calls an op with every record spread out.
template <typename Function, typename... Arguments>
auto call(const c10::TypedOperatorHandle<Function>& op, const Arguments&... arguments) {
  return std::apply([&](const auto&... fields) { return op.call(fields...); },
                    std::tuple_cat(fields_of(arguments)...));
}

template <auto kernel>
struct Spreading;
template <typename Result, typename... Arguments, Result (*kernel)(Arguments...)>
struct Spreading<kernel> {
  using Of = Spread<Result(Arguments...)>;
  static constexpr auto kFunction =
      &Of::template FunctionOf<typename Of::Fields>::template call<kernel>;
};

/// What to register for a kernel that takes records.
template <auto kernel>
inline constexpr auto with_records = Spreading<kernel>::kFunction;

}  // namespace torchmoe
