// The experts' activations and their derivatives: scalar formulas shared by every backend.
//
// A plain activation maps the pre-activation u to f(u). A gated one takes two pre-activations, the
// gate g and the value u, and gives f(g) * u (GLU variants, Shazeer 2020, arXiv 2002.05202).
#pragma once

#include <cmath>
#include <string_view>
#include <type_traits>

#include "activation_names.h"
#include "choices.h"
#include "host_device.h"
#include "sigmoid.h"

namespace torchmoe {

inline Activation choose_activation(std::string_view op, std::string_view given) {
  static constexpr Choices<Activation, 7> choices{{{"gelu", Activation::gelu},
                                                   {"gelu_tanh", Activation::gelu_tanh},
                                                   {"relu", Activation::relu},
                                                   {"silu", Activation::silu},
                                                   {"swiglu", Activation::swiglu},
                                                   {"geglu", Activation::geglu},
                                                   {"reglu", Activation::reglu}}};
  return choose(op, "activation", given, choices);
}

constexpr bool is_gated(Activation activation) {
  return activation == Activation::swiglu || activation == Activation::geglu ||
         activation == Activation::reglu;
}

/// The nonlinearity f of a gated activation; a plain one is its own.
constexpr Activation nonlinearity(Activation activation) {
  switch (activation) {
    case Activation::swiglu:
      return Activation::silu;
    case Activation::geglu:
      return Activation::gelu;
    case Activation::reglu:
      return Activation::relu;
    default:
      return activation;
  }
}

/// f(u) and f'(u).
template <typename T>
struct ValueAndSlope {
  T value;
  T slope;
};

template <Activation f, typename T>
TORCHMOE_HOST_DEVICE T activate(T u) {
  if constexpr (f == Activation::relu) {
    return u < T(0) ? T(0) : u;  // this order keeps a NaN a NaN
  } else if constexpr (f == Activation::silu) {
    return u * sigmoid(u);
  } else if constexpr (f == Activation::gelu) {
    constexpr T kInverseSqrt2 = T(0.70710678118654752440);
    return T(0.5) * u * (T(1) + std::erf(u * kInverseSqrt2));
  } else {
    static_assert(f == Activation::gelu_tanh);
    constexpr T kSqrt2OverPi = T(0.79788456080286535588);
    return T(0.5) * u * (T(1) + std::tanh(kSqrt2OverPi * (u + T(0.044715) * u * u * u)));
  }
}

template <Activation f, typename T>
TORCHMOE_HOST_DEVICE ValueAndSlope<T> activate_with_slope(T u) {
  if constexpr (f == Activation::relu) {
    return {activate<f>(u), u > T(0) ? T(1) : T(0)};
  } else if constexpr (f == Activation::silu) {
    const T s = sigmoid(u);
    return {u * s, s * (T(1) + u * (T(1) - s))};
  } else if constexpr (f == Activation::gelu) {
    constexpr T kInverseSqrt2 = T(0.70710678118654752440);
    constexpr T kInverseSqrt2Pi = T(0.39894228040143267794);
    const T cdf = T(0.5) * (T(1) + std::erf(u * kInverseSqrt2));
    return {u * cdf, cdf + u * kInverseSqrt2Pi * std::exp(T(-0.5) * u * u)};
  } else {
    static_assert(f == Activation::gelu_tanh);
    constexpr T kSqrt2OverPi = T(0.79788456080286535588);
    const T t = std::tanh(kSqrt2OverPi * (u + T(0.044715) * u * u * u));
    const T inner_slope = kSqrt2OverPi * (T(1) + T(3 * 0.044715) * u * u);
    return {T(0.5) * u * (T(1) + t), T(0.5) * (T(1) + t + u * (T(1) - t * t) * inner_slope)};
  }
}

/// Calls `body` with the nonlinearity of `activation` as a compile-time constant, so that inner
/// loops have no branch on it.
template <typename Body>
TORCHMOE_HOST_DEVICE void with_nonlinearity(Activation activation, const Body& body) {
  switch (nonlinearity(activation)) {
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>{});
    case Activation::silu:
      return body(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu:
      return body(std::integral_constant<Activation, Activation::gelu>{});
    default:
      return body(std::integral_constant<Activation, Activation::gelu_tanh>{});
  }
}

}  // namespace torchmoe
