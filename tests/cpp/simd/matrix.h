// Matrices of float64, and how their numbers are stored in the types of cpu/simd.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/simd/simd.h"

namespace torchmoe::test {

/// A binary floating-point type by the bits of its fraction and of its exponent.
struct Format {
  int fraction;
  int exponent;

  int bias() const { return (1 << (exponent - 1)) - 1; }
  uint32_t infinity() const { return ((1U << exponent) - 1) << fraction; }

  /// Rounds to nearest, ties to even.
  uint32_t bits(double x) const {
    const uint32_t sign = std::signbit(x) ? 1U << (fraction + exponent) : 0;
    if (std::isnan(x)) {
      return sign | infinity() | 1U << (fraction - 1);
    }
    if (std::isinf(x)) {
      return sign | infinity();
    }
    const int least = 1 - bias();
    const int e = x == 0 ? least : std::max(std::ilogb(x), least);
    if (e > bias()) {
      return sign | infinity();
    }
    // A fraction that is rounded up to 2 raises the exponent, that of the largest number to inf's.
    const auto significand =
        static_cast<uint32_t>(std::nearbyint(std::scalbn(std::fabs(x), fraction - e)));
    return sign | ((static_cast<uint32_t>(e - least) << fraction) + significand);
  }

  double value(uint32_t bits) const {
    const double sign = (bits >> (fraction + exponent)) != 0 ? -1 : 1;
    const uint32_t size = bits & (infinity() | ((1U << fraction) - 1));
    if (size >= infinity()) {
      return sign * (size == infinity() ? HUGE_VAL : NAN);
    }
    const int e = static_cast<int>(size >> fraction);
    const uint32_t significand = (size & ((1U << fraction) - 1)) | (e > 0 ? 1U << fraction : 0);
    return sign * std::scalbn(significand, std::max(e, 1) - bias() - fraction);
  }
};

/// A stored number of 16 bits.
template <int fraction, int exponent>
struct Narrow {
  static constexpr Format kFormat{fraction, exponent};

  uint16_t bits;

  Narrow() = default;
  explicit Narrow(double x) : bits(static_cast<uint16_t>(kFormat.bits(x))) {}
  operator double() const { return kFormat.value(bits); }  // NOLINT: as float's is
};
using BFloat16 = Narrow<7, 8>;
using Float16 = Narrow<10, 5>;

template <typename T>
constexpr cpu::Element element_of() {
  return std::is_same_v<T, double>     ? cpu::Element::float64
         : std::is_same_v<T, BFloat16> ? cpu::Element::bfloat16
         : std::is_same_v<T, Float16>  ? cpu::Element::float16
                                       : cpu::Element::float32;
}

/// Half the distance of 1 to the next number of the type, and its least number.
template <typename T>
struct RoundingOf {
  static constexpr double kUnit = std::is_same_v<T, float>      ? 0x1p-24
                                  : std::is_same_v<T, BFloat16> ? 0x1p-8
                                                                : 0x1p-11;
  static constexpr double kLeast = std::is_same_v<T, float>      ? 0x1p-149
                                   : std::is_same_v<T, BFloat16> ? 0x1p-133
                                                                 : 0x1p-24;
};

/// Calls body.template operator()<T>() with the type that is stored, one of those above.
template <typename Body>
auto with_stored(cpu::Element type, const Body& body) {
  if (type == cpu::Element::float64) {
    return body.template operator()<double>();
  }
  if (type == cpu::Element::bfloat16) {
    return body.template operator()<BFloat16>();
  }
  if (type == cpu::Element::float16) {
    return body.template operator()<Float16>();
  }
  return body.template operator()<float>();
}

inline const char* name_of(cpu::Element type) {
  switch (type) {
#define TORCHMOE_CASE(name, ...) \
  case cpu::Element::name:       \
    return #name;
    TORCHMOE_ELEMENTS(TORCHMOE_CASE)
#undef TORCHMOE_CASE
  }
  return "";
}

/// A matrix, row after row.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns, double value = 0)
      : rows_(rows), columns_(columns), numbers_(rows * columns, value) {}

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t size() const { return rows_ * columns_; }
  double& operator()(int64_t i, int64_t j) { return numbers_[i * columns_ + j]; }
  double operator()(int64_t i, int64_t j) const { return numbers_[i * columns_ + j]; }
  double* row(int64_t i) { return numbers_.data() + i * columns_; }
  const double* row(int64_t i) const { return numbers_.data() + i * columns_; }
  std::vector<double>& numbers() { return numbers_; }
  const std::vector<double>& numbers() const { return numbers_; }

  Matrix transposed() const;
  /// The last rows, and of each the last columns.
  Matrix last(int64_t rows, int64_t columns) const;

  /// f of every number.
  template <typename F>
  Matrix map(const F& f) const {
    Matrix result = *this;
    for (double& x : result.numbers_) {
      x = f(x);
    }
    return result;
  }
  /// As it is when its numbers are stored.
  Matrix as(cpu::Element type) const {
    return with_stored(type, [&]<typename T>() {
      return map([](double x) { return static_cast<double>(static_cast<T>(x)); });
    });
  }

  /// Whether the numbers are the same, of each NaN that it is one, of each zero the sign.
  bool equals(const Matrix& other) const;

 private:
  int64_t rows_;
  int64_t columns_;
  std::vector<double> numbers_;
};

/// left [m, k] times right [k, n], and the sums of the products' magnitudes.
std::pair<Matrix, Matrix> product(const Matrix& left, const Matrix& right);

/// Values in [-scale, scale], all different, without a random generator.
Matrix wave_matrix(int64_t rows, int64_t columns, double phase = 0, double scale = 1);

}  // namespace torchmoe::test
