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

inline Bounded sum_of(Bounded a, Bounded b) {
  const double value = a.value + b.value;
  return {value, a.error + b.error + kUnit * std::fabs(value)};
}

inline Bounded product_of(Bounded a, Bounded b) {
  const double value = a.value * b.value;
  return {value,
          std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error +
              kUnit * std::fabs(value) + kLeast};
}

/// A function's value and slope.
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

/// The factors s of f(u) = u s(u).
inline ExpectedActivation factor_of_relu(double u) {
  return {{u > 0 ? 1.0 : 0.0, 0}, {0, 0}};
}

inline ExpectedActivation factor_of_relu2(double u) {
  return {{u > 0 ? u : 0, 0}, {u > 0 ? 1.0 : 0.0, 0}};
}

inline ExpectedActivation factor_of_silu(double u) {
  const double s = torchmoe::sigmoid(u), rest = torchmoe::sigmoid(-u);
  const double s_error = sigmoid_error(s, rest, 4 * kUnit);
  const Bounded factor{s, s_error};
  return {factor, product_of(factor, {rest, s_error + kUnit * rest})};
}

/// The relative error of P(X > |u|) = exp(-u^2 / 2) s q(s), in u: 4 of exp and u^2 / 2 of its
/// argument's rounding; s is off by 2.4 (a constant, a sum, a quotient), which s q(s) makes 2.5 times
/// as large; 3 of the polynomial's steps, whose partial sums add up to 3 q; 0.7 of its fit; and 2
/// products.
inline double beyond_error(double u) {
  return (u * u / 2 + 4 + 2.4 * 2.5 + 3 + 0.7 + 2) * kUnit;
}

inline ExpectedActivation factor_of_gelu(double u) {
  constexpr double kInverseSqrt2 = 0.70710678118654752440;
  constexpr double kInverseSqrt2Pi = 0.39894228040143267794;
  const double size = std::fabs(u);
  const double beyond = std::erfc(size * kInverseSqrt2) / 2, below = u < 0 ? beyond : 1 - beyond;
  const double density = std::exp(-u * u / 2);
  const double flushed = density < 2 * kLeastNormal ? kLeastNormal : 0;
  const double below_error = beyond * beyond_error(u) + flushed + (u < 0 ? 0 : kUnit * below);
  // A constant and a product.
  return {{below, below_error},
          {kInverseSqrt2Pi * density,
           kInverseSqrt2Pi * density * (u * u / 2 + 4 + 2) * kUnit + (size < 100 ? flushed : 0)}};
}

inline ExpectedActivation factor_of_gelu_tanh(double u) {
  constexpr double kTwoSqrt2OverPi = 1.59576912160573071176;
  const double twice = kTwoSqrt2OverPi * (u + 0.044715 * u * u * u);
  const double s = torchmoe::sigmoid(twice), rest = torchmoe::sigmoid(-twice);
  // Two constants, three products and a sum, all of the same sign, in the argument.
  const double s_error = sigmoid_error(s, rest, (4 + 6 * std::fabs(twice)) * kUnit);
  const double inner = kTwoSqrt2OverPi * (1 + 3 * 0.044715 * u * u);  // off by 6: as the argument
  const double slope = rest == 0 ? 0 : s * rest * inner;
  return {
      {s, s_error},
      {slope, inner * (s * (s_error + kUnit * rest) + rest * s_error) + slope * (6 + 2) * kUnit}};
}

/// Small ones too, where the formulas of common/activation.h lose all digits.
inline ExpectedActivation expected_factor(Nonlinearity f, double u) {
  switch (f) {
    case Nonlinearity::relu:
      return factor_of_relu(u);
    case Nonlinearity::relu2:
      return factor_of_relu2(u);
    case Nonlinearity::silu:
      return factor_of_silu(u);
    case Nonlinearity::gelu:
      return factor_of_gelu(u);
    default:
      return factor_of_gelu_tanh(u);
  }
}

/// f(u) = u s(u) and f'(u) = s(u) + u s'(u).
inline ExpectedActivation expected_activation(Nonlinearity f, double u) {
  const auto [s, slope] = expected_factor(f, u);
  const Bounded given{u, 0};
  if (f == Nonlinearity::relu) {
    return {{u < 0 ? 0 : u, 0}, s};
  }
  if (f == Nonlinearity::relu2) {
    return {product_of(s, s), {2 * s.value, 0}};
  }
  const double term = slope.value == 0 ? 0 : u * slope.value;
  return {product_of(given, s),
          sum_of(s, {term, std::fabs(u) * slope.error + kUnit * std::fabs(term)})};
}

/// c tanh(z) and 1 - tanh(z)^2 for z = x / c, which is off by 2 (a reciprocal and a product). tanh is
/// off by that, 3 of the polynomial's last steps, whose terms are at most a seventh of z, 1 of its
/// fit and what follows, or by exp's 4, its argument's 2 |2 z| and 3 steps, as parts of what is
/// 1 - tanh(z).
inline ExpectedActivation expected_softcap(double x, double c) {
  if (std::isinf(c)) {
    return {{x, 0}, {1, 0}};
  }
  const double z = x / c, value = c * std::tanh(z);
  const double cosine = std::cosh(std::min(std::fabs(z), 300.0)), slope = 1 / (cosine * cosine);
  const double size = std::fabs(z);
  const double far = (4 + 4 * size + 5) * kUnit;
  return {{value, 8 * kUnit * std::fabs(value) + kLeast},
          {slope, (size < 0.7 ? 8 * kUnit : slope * far) + kLeast}};
}

/// A gated activation and its slopes by gate and up, step by step as Gating says.
struct ExpectedGated {
  Bounded value;
  Bounded by_gate;
  Bounded by_up;
};

inline ExpectedGated expected_gated(Nonlinearity f,
                                    const torchmoe::Gating& gating,
                                    double gate,
                                    double up) {
  constexpr double kSteepest = 1.3;  // |s''| of every f here is below that
  const bool gate_cut = gate > gating.limit, up_cut = std::fabs(up) > gating.limit;
  const double g = std::min(gate, gating.limit);
  const double v = std::clamp(up, -gating.limit, gating.limit);
  const double alpha = gating.alpha, inner = alpha * g;
  auto [s, s_slope] = expected_factor(f, inner);
  s.error += kUnit * std::fabs(inner * s_slope.value);
  s_slope.error += kUnit * std::fabs(inner) * kSteepest;
  const auto [linear, linear_slope] = expected_softcap(g, gating.gate_softcap);
  const auto [bent, bent_slope] = expected_softcap(v, gating.up_softcap);
  const Bounded of_gate = product_of(linear, s);
  const Bounded of_up = sum_of(bent, {gating.up_offset, 0});
  const Bounded slope =
      sum_of(product_of(linear_slope, s), product_of(linear, product_of({alpha, 0}, s_slope)));
  const Bounded none{0, 0};
  return {product_of(of_gate, of_up),
          gate_cut ? none : product_of(slope, of_up),
          up_cut ? none : product_of(of_gate, bent_slope)};
}

}  // namespace torchmoe::test
