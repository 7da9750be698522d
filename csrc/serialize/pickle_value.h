// What the program of a pickle computes with. Texts lie in the program and containers in its
// reader: values are small, and freed without recursion, however deep or cyclic a crafted program
// nests them.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <variant>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <c10/util/Exception.h>

namespace torchmoe::pickle {

struct Value;
using Values = std::vector<Value>;

struct Mark {};
struct None {};
struct Float {};
struct Global {
  std::string_view module;
  std::string_view name;

  bool operator==(const Global&) const = default;
};
struct TypedStorage {
  at::Storage bytes;
  at::ScalarType dtype;
};
struct Tuple {
  Values* items;
};
struct List {};
struct Dict {
  Values* items;  // key, value, key, value
};

struct Value : std::variant<Mark,
                            None,
                            bool,
                            int64_t,
                            Float,
                            std::string_view,
                            Global,
                            TypedStorage,
                            at::Tensor,
                            Tuple,
                            List,
                            Dict> {
  using variant::variant;

  const char* kind() const {
    constexpr std::array kinds{"a mark",
                               "None",
                               "a bool",
                               "an int",
                               "a float",
                               "a str",
                               "a class",
                               "a storage",
                               "a tensor",
                               "a tuple",
                               "a list",
                               "a dict"};
    return kinds[index()];
  }

  template <typename T>
  const T& as() const {
    const T* value = std::get_if<T>(this);
    TORCH_CHECK_VALUE(value, "its pickle has ", kind(), " where ", Value(T{}).kind(), " belongs");
    return *value;
  }
};

}  // namespace torchmoe::pickle
