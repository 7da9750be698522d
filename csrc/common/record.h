// Records: structs of tensors that belong together, which a schema lists one by one.
#pragma once

#include <tuple>
#include <type_traits>

namespace torchmoe {

/// `fields()` ties the members in the schema's order.
template <typename T>
concept Record = requires(const std::remove_cvref_t<T>& record) { record.fields(); };

/// A tuple of references: the fields of a record, or the argument itself.
template <typename T>
auto fields_of(const T& argument) {
  if constexpr (Record<T>) {
    return argument.fields();
  } else {
    return std::tie(argument);
  }
}

}  // namespace torchmoe
