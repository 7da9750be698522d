// The activations and their derivatives in float64, and how far a float32 result may be from them.
//
// The tolerances are running error bounds, to first order in u = 2^-24 (Higham, Accuracy and
// Stability of Numerical Algorithms, section 3.3): what each operation of csrc/cpu/simd rounds and
// what it makes of the errors in its operands. exp is off by 2 units in the last place, 4 u, and
// gives 0 where its result is below the least normal number.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/activation_names.h"
#include "common/sigmoid.h"
#include "simd/memory.h"

namespace torchmoe::test {

constexpr double kLeastNormal = 0x1p-126;
constexpr double kLeast = 0x1p-149;  // what a subnormal result rounds by, twice

/// A value and how far a float32 result may be from it.
struct Bounded {
  double value;
  double error;
};

struct ExpectedActivation {
  Bounded value;
  Bounded slope;
};

/// 1 / (1 + exp(-u)) where exp(-u) is off by `relative`; `rest` is 1 - s. Where exp(-u) is so small
/// that 1 + exp(-u) is 1, the sum's error is rest itself and the quotient has none. Where exp(-u) is
/// inf, from 2^128 on, s is 0.
inline double sigmoid_error(double s, double rest, double relative) {
  return s * rest * relative + 2 * s * std::min(rest, kUnit) + (s < 0x1.01p-128 ? s : kLeast);
}

inline ExpectedActivation expected_relu(double u) {
  return {{u < 0 ? 0 : u, 0}, {u > 0 ? 1.0 : 0.0, 0}};
}

inline ExpectedActivation expected_silu(double u) {
  const double s = torchmoe::sigmoid(u), rest = torchmoe::sigmoid(-u), size = std::fabs(u);
  const double s_error = sigmoid_error(s, rest, 4 * kUnit);
  const double value = u * s;
  const double inner = 1 + u * rest;  // 1 - s, the product and the sum round
  const double inner_error =
      size * (s_error + kUnit * rest) + kUnit * size * rest + kUnit * std::fabs(inner);
  const double slope = s * inner;
  return {{value, size * s_error + kUnit * std::fabs(value)},
          {slope, s * inner_error + std::fabs(inner) * s_error + kUnit * std::fabs(slope)}};
}

/// The relative error of P(X > |u|) = exp(-u^2 / 2) s q(s), in u: 4 of exp and u^2 / 2 of its
/// argument's rounding; s is off by 2.4 (a constant, a sum, a quotient), which s q(s) makes 2.5 times
/// as large; 3 of the polynomial's steps, whose partial sums add up to 3 q; 0.7 of its fit; and 2
/// products.
inline double beyond_error(double u) {
  return (u * u / 2 + 4 + 2.4 * 2.5 + 3 + 0.7 + 2) * kUnit;
}

inline ExpectedActivation expected_gelu(double u) {
  constexpr double kInverseSqrt2 = 0.70710678118654752440;
  constexpr double kInverseSqrt2Pi = 0.39894228040143267794;
  const double size = std::fabs(u);
  const double beyond = std::erfc(size * kInverseSqrt2) / 2, below = u < 0 ? beyond : 1 - beyond;
  const double density = std::exp(-u * u / 2);
  const double flushed = density < 2 * kLeastNormal ? kLeastNormal : 0;
  const double below_error = beyond * beyond_error(u) + flushed + (u < 0 ? 0 : kUnit * below);
  const double value = u * below;
  const double term = density == 0 ? 0 : u * kInverseSqrt2Pi * density;
  // A constant and two products.
  const double term_error =
      std::fabs(term) * (u * u / 2 + 4 + 3) * kUnit + (size < 100 ? size * flushed : 0);
  const double slope = below + term;
  return {{value, size * below_error + kUnit * std::fabs(value)},
          {slope, below_error + term_error + kUnit * std::fabs(slope)}};
}

inline ExpectedActivation expected_gelu_tanh(double u) {
  constexpr double kTwoSqrt2OverPi = 1.59576912160573071176;
  const double size = std::fabs(u);
  const double twice = kTwoSqrt2OverPi * (u + 0.044715 * u * u * u);
  const double s = torchmoe::sigmoid(twice), rest = torchmoe::sigmoid(-twice);
  // Two constants, three products and a sum, all of the same sign, in the argument.
  const double s_error = sigmoid_error(s, rest, (4 + 6 * std::fabs(twice)) * kUnit);
  const double value = u * s;
  const double inner = kTwoSqrt2OverPi * (1 + 3 * 0.044715 * u * u);  // off by 6: as the argument
  const double term = rest == 0 ? 0 : u * s * rest * inner;
  const double term_error = size * inner * (s * (s_error + kUnit * rest) + rest * s_error) +
                            std::fabs(term) * (6 + 3) * kUnit;
  const double slope = s + term;
  return {{value, size * s_error + kUnit * std::fabs(value)},
          {slope, s_error + term_error + kUnit * std::fabs(slope)}};
}

/// f(u) and f'(u), small ones too, where the formulas of common/activation.h lose all digits.
inline ExpectedActivation expected_activation(Nonlinearity f, double u) {
  switch (f) {
    case Nonlinearity::relu:
      return expected_relu(u);
    case Nonlinearity::silu:
      return expected_silu(u);
    case Nonlinearity::gelu:
      return expected_gelu(u);
    default:
      return expected_gelu_tanh(u);
  }
}

}  // namespace torchmoe::test
