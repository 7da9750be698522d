// Settings in words: "Capacity(factor=1.25, order='token')", as the Python layer shows them.
#pragma once

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nn/detail/checks.h"

namespace torchmoe::nn {

class Shown {
 public:
  Shown(std::ostream& stream, std::string_view name) : stream_(stream) { stream_ << name << '('; }

  template <typename T>
  Shown& show(std::string_view name, const T& value) {
    stream_ << separator_ << name << '=';
    put(value);
    separator_ = ", ";
    return *this;
  }

  /// Only where the value is another than `neutral`.
  template <typename T>
  Shown& show(std::string_view name, const T& value, const T& neutral) {
    return value == neutral ? *this : show(name, value);
  }

  std::ostream& end() { return stream_ << ')'; }

 private:
  void put(double value) { stream_ << shown(value); }
  void put(int64_t value) { stream_ << value; }
  void put(bool value) { stream_ << (value ? "True" : "False"); }
  void put(const std::string& value) { stream_ << '\'' << value << '\''; }
  void put(const std::vector<int64_t>& value) { stream_ << listed(value); }
  void put(const std::vector<std::pair<std::string, double>>& pairs) {
    const char* separator = "[";
    for (const auto& [name, value] : pairs) {
      stream_ << separator << "('" << name << "', " << shown(value) << ')';
      separator = ", ";
    }
    stream_ << ']';
  }
  template <typename T>
  void put(const std::optional<T>& value) {
    if (value) {
      put(*value);
    } else {
      stream_ << "None";
    }
  }

  std::ostream& stream_;
  const char* separator_ = "";
};

}  // namespace torchmoe::nn
