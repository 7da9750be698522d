// The experts' activations and their derivatives: scalar formulas shared by every backend.
//
// A plain activation maps the pre-activation u to f(u). A gated one takes two pre-activations, the
// gate g and the value u, and gives f(g) * u (GLU variants, Shazeer 2020, arXiv 2002.05202), or what
// Gating makes of that.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <limits>

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

/// A function's value and derivative.
template <typename T>
struct ValueAndSlope {
  T value;
  T slope;
};

/// The factor s of a nonlinearity f(u) = u s(u): s of a scalar or a tensor, and s with s' of a
/// scalar.
template <Nonlinearity f>
struct Factor;

template <>
struct Factor<Nonlinearity::relu> {
  /// 1 where u > 0, and a NaN for one.
  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(T u) {
    return u > T(0) ? T(1) : (u <= T(0) ? T(0) : u);
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE ValueAndSlope<T> with_slope(T u) {
    return {value(u), T(0)};
  }
};

template <>
struct Factor<Nonlinearity::relu2> {
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
struct Factor<Nonlinearity::silu> {
  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(T u) {
    return sigmoid(u);
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE ValueAndSlope<T> with_slope(T u) {
    const T s = sigmoid(u);
    return {s, s * (T(1) - s)};
  }
};

template <>
struct Factor<Nonlinearity::gelu> {
  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(T u) {
    using std::erf;
    using C = Constant<T>;
    constexpr C kInverseSqrt2 = C(0.70710678118654752440);
    return C(0.5) * (C(1) + erf(u * kInverseSqrt2));
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE ValueAndSlope<T> with_slope(T u) {
    constexpr T kInverseSqrt2Pi = T(0.39894228040143267794);
    return {value(u), kInverseSqrt2Pi * std::exp(T(-0.5) * u * u)};
  }
};

template <>
struct Factor<Nonlinearity::gelu_tanh> {
  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(T u) {
    using std::tanh;
    using C = Constant<T>;
    constexpr C kSqrt2OverPi = C(0.79788456080286535588);
    return C(0.5) * (C(1) + tanh(kSqrt2OverPi * (u + C(0.044715) * u * u * u)));
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE ValueAndSlope<T> with_slope(T u) {
    constexpr T kSqrt2OverPi = T(0.79788456080286535588);
    const T t = std::tanh(kSqrt2OverPi * (u + T(0.044715) * u * u * u));
    const T inner_slope = kSqrt2OverPi * (T(1) + T(3 * 0.044715) * u * u);
    return {T(0.5) * (T(1) + t), T(0.5) * (T(1) - t * t) * inner_slope};
  }
};

/// The formulas of a nonlinearity f: f(u) of a scalar or a tensor, and f(u) with f'(u) of a scalar.
template <Nonlinearity f>
struct Formula {
  using FactorOf = Factor<f>;

  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(T u) {
    return u * FactorOf::value(u);
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE ValueAndSlope<T> with_slope(T u) {
    const auto [s, slope] = FactorOf::with_slope(u);
    return {u * s, s + u * slope};
  }
};

// Without the product of an infinite u and a factor of 0.
template <>
struct Formula<Nonlinearity::relu> {
  using FactorOf = Factor<Nonlinearity::relu>;

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
struct Formula<Nonlinearity::relu2> {
  using FactorOf = Factor<Nonlinearity::relu2>;

  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(T u) {
    return relu(u) * relu(u);
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE ValueAndSlope<T> with_slope(T u) {
    return {value(u), T(2) * relu(u)};
  }
};

/// A gated activation and its derivatives by both pre-activations.
template <typename T>
struct GatedValue {
  T value;
  T by_gate;
  T by_up;
};

/// x as tanh bends it towards c, which may be infinite.
template <typename T>
TORCHMOE_HOST_DEVICE ValueAndSlope<T> softcap(T x, T c) {
  if (c == std::numeric_limits<T>::infinity()) {
    return {x, T(1)};
  }
  const T t = std::tanh(x / c);
  return {c * t, (T(1) - t) * (T(1) + t)};
}

/// The product with a factor of 0 is 0, also that of infinity.
template <typename T>
TORCHMOE_HOST_DEVICE T times_factor(T x, T factor) {
  return factor == T(0) ? T(0) : x * factor;
}

/// f(gate) * up.
template <Nonlinearity f>
struct PlainGate {
  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(const Gating&, T gate, T up) {
    return Formula<f>::value(gate) * up;
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE GatedValue<T> with_slopes(const Gating&, T gate, T up) {
    const auto [value, slope] = Formula<f>::with_slope(gate);
    return {value * up, slope * up, value};
  }
};

/// All that Gating says. A bound's own derivative is that inside of it, as torch.clamp's is.
template <Nonlinearity f>
struct ShapedGate {
  template <typename T>
  static TORCHMOE_HOST_DEVICE T value(const Gating& gating, T gate, T up) {
    return with_slopes(gating, gate, up).value;
  }

  template <typename T>
  static TORCHMOE_HOST_DEVICE GatedValue<T> with_slopes(const Gating& gating, T gate, T up) {
    const T alpha = static_cast<T>(gating.alpha);
    const T limit = static_cast<T>(gating.limit);
    const bool gate_cut = gate > limit;
    const bool up_cut = up > limit || up < -limit;
    const T g = gate_cut ? limit : gate;
    const T v = up_cut ? (up > T(0) ? limit : -limit) : up;
    const auto [s, s_slope] = Factor<f>::with_slope(alpha * g);
    const auto [linear, linear_slope] = softcap(g, static_cast<T>(gating.gate_softcap));
    const auto [bent, bent_slope] = softcap(v, static_cast<T>(gating.up_softcap));
    const T of_gate = times_factor(linear, s);
    const T slope = linear_slope * s + times_factor(linear, alpha * s_slope);
    const T of_up = bent + static_cast<T>(gating.up_offset);
    return {of_gate * of_up, gate_cut ? T(0) : slope * of_up, up_cut ? T(0) : of_gate * bent_slope};
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

/// Calls `body` with how a gated activation is formed of f: PlainGate<f> or ShapedGate<f>.
template <template <Nonlinearity> typename Gate, typename Body>
TORCHMOE_HOST_DEVICE void with_gate(Nonlinearity f, const Body& body) {
#define TORCHMOE_CASE(name, f, kind, doc) \
  TORCHMOE_IF_PLAIN_##kind(case Nonlinearity::name : return body(Gate<Nonlinearity::name>{});)
  switch (f) { TORCHMOE_ACTIVATIONS(TORCHMOE_CASE) }
#undef TORCHMOE_CASE
}

/// An activation as kernels are given it.
struct ChosenActivation {
  Activation name;
  Gating gating;

  constexpr Nonlinearity f() const { return nonlinearity_of(name); }
  constexpr bool is_gated() const { return torchmoe::is_gated(name); }
  constexpr bool is_interleaved() const { return is_gated() && gating.interleaved; }
};

}  // namespace torchmoe
