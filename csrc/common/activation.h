// The experts' activations and their derivatives: scalar formulas shared by every backend.
//
// A plain activation maps the pre-activation u to f(u). A gated one takes two pre-activations, the
// gate g and the value u, and gives f(g) * u (GLU variants, Shazeer 2020, arXiv 2002.05202).
#pragma once

#include <array>
#include <cmath>
#include <cstddef>

#include "activation_names.h"
#include "host_device.h"
#include "sigmoid.h"

namespace torchmoe {

constexpr ActivationKind kind_of(Activation activation) {
#define TORCHMOE_KIND(name, f, kind, doc) ActivationKind::kind,
  constexpr std::array kKinds{TORCHMOE_ACTIVATIONS(TORCHMOE_KIND)};
#undef TORCHMOE_KIND
  return kKinds[static_cast<size_t>(activation)];
}

constexpr Nonlinearity nonlinearity_of(Activation activation) {
#define TORCHMOE_FUNCTION(name, f, kind, doc) Nonlinearity::f,
  constexpr std::array kFunctions{TORCHMOE_ACTIVATIONS(TORCHMOE_FUNCTION)};
#undef TORCHMOE_FUNCTION
  return kFunctions[static_cast<size_t>(activation)];
}

constexpr bool is_gated(Activation activation) {
  return kind_of(activation) == ActivationKind::gated;
}

/// The type of a formula's constants: the scalar's own, and a double where u is a tensor, for which
/// torch's functions of the same names are used (autograd/activate.cpp).
template <typename T>
struct ConstantOf {
  using Type = T;
};
template <typename T>
using Constant = typename ConstantOf<T>::Type;

/// max(u, 0), in the order that keeps a NaN a NaN.
template <typename T>
TORCHMOE_HOST_DEVICE T relu(T u) {
  return u < T(0) ? T(0) : u;
}

/// f(u) and f'(u).
template <typename T>
struct ValueAndSlope {
  T value;
  T slope;
};

/// The formulas of a nonlinearity f: f(u) of a scalar or a tensor, and f(u) with f'(u) of a scalar.
template <Nonlinearity f>
struct Formula;

template <>
struct Formula<Nonlinearity::relu> {
  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(T u) {
    return relu(u);
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE ValueAndSlope<T> with_slope(T u) {
    return {value(u), u > T(0) ? T(1) : T(0)};
  }
};

template <>
struct Formula<Nonlinearity::silu> {
  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(T u) {
    return u * sigmoid(u);
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE ValueAndSlope<T> with_slope(T u) {
    const T s = sigmoid(u);
    return {u * s, s * (T(1) + u * (T(1) - s))};
  }
};

template <>
struct Formula<Nonlinearity::gelu> {
  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(T u) {
    using std::erf;
    using C = Constant<T>;
    constexpr C kInverseSqrt2 = C(0.70710678118654752440);
    return C(0.5) * u * (C(1) + erf(u * kInverseSqrt2));
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE ValueAndSlope<T> with_slope(T u) {
    constexpr T kInverseSqrt2 = T(0.70710678118654752440);
    constexpr T kInverseSqrt2Pi = T(0.39894228040143267794);
    const T cdf = T(0.5) * (T(1) + std::erf(u * kInverseSqrt2));
    return {u * cdf, cdf + u * kInverseSqrt2Pi * std::exp(T(-0.5) * u * u)};
  }
};

template <>
struct Formula<Nonlinearity::gelu_tanh> {
  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(T u) {
    using std::tanh;
    using C = Constant<T>;
    constexpr C kSqrt2OverPi = C(0.79788456080286535588);
    return C(0.5) * u * (C(1) + tanh(kSqrt2OverPi * (u + C(0.044715) * u * u * u)));
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE ValueAndSlope<T> with_slope(T u) {
    constexpr T kSqrt2OverPi = T(0.79788456080286535588);
    const T t = std::tanh(kSqrt2OverPi * (u + T(0.044715) * u * u * u));
    const T inner_slope = kSqrt2OverPi * (T(1) + T(3 * 0.044715) * u * u);
    return {T(0.5) * u * (T(1) + t), T(0.5) * (T(1) + t + u * (T(1) - t * t) * inner_slope)};
  }
};

/// Calls `body` with f as Formula<f>, so that inner loops have no branch on it.
template <typename Body>
TORCHMOE_HOST_DEVICE void with_nonlinearity(Nonlinearity f, const Body& body) {
#define TORCHMOE_CASE(name, f, kind, doc) \
  TORCHMOE_IF_PLAIN_##kind(case Nonlinearity::name : return body(Formula<Nonlinearity::name>{});)
  switch (f) { TORCHMOE_ACTIVATIONS(TORCHMOE_CASE) }
#undef TORCHMOE_CASE
}

}  // namespace torchmoe
