// The experts' activations on vectors; common/activation.h has the formulas.
#include "cpu/simd/activation.h"

#include <type_traits>
#include <utility>

#include "cpu/simd/sizes.h"
#include "cpu/simd/vector.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

namespace {

struct ValueAndSlope {
  Vector value;
  Vector slope;
};

inline Vector sigmoid(Vector u) {
  return 1.0F / (1.0F + exp(-u));
}

/// The standard normal distribution at u, and its density without the factor 1 / sqrt(2 pi).
struct Normal {
  Vector below;    // P(X <= u)
  Vector density;  // exp(-u^2 / 2)
};

/// P(X > |u|) = exp(-u^2 / 2) s q(s) with s = 1 / (1 + 0.32 |u|) and q fitted to a relative error of
/// 4e-8, so that small probabilities are right too.
inline Normal normal(Vector u) {
  const Vector size = u < 0.0F ? -u : u;
  const Vector s = 1.0F / (1.0F + 0.32F * size);
  Vector q = broadcast(-0.021078660576606217F);
  q = q * s + 0.09540945531373463F;
  q = q * s - 0.14671151667976776F;
  q = q * s + 0.06533200662340621F;
  q = q * s - 0.0093797754343862F;
  q = q * s + 0.05865462676933956F;
  q = q * s + 0.08782901569074605F;
  q = q * s + 0.11462235541546575F;
  q = q * s + 0.12766094822561963F;
  q = q * s + 0.12766152865406458F;
  const Vector density = exp(-0.5F * u * u);
  const Vector beyond = density * s * q;
  return {u < 0.0F ? beyond : 1.0F - beyond, density};
}

/// The factor s of a nonlinearity f(u) = u s(u), and s'.
template <Nonlinearity f>
struct Factor;

template <>
struct Factor<Nonlinearity::relu> {
  static ValueAndSlope with_slope(Vector u) {
    const Vector zero{};
    return {u > 0.0F ? broadcast(1.0F) : (u <= 0.0F ? zero : u), zero};
  }
};

template <>
struct Factor<Nonlinearity::relu2> {
  static ValueAndSlope with_slope(Vector u) {
    const Vector zero{};
    return {u < 0.0F ? zero : u, u > 0.0F ? broadcast(1.0F) : zero};
  }
};

template <>
struct Factor<Nonlinearity::silu> {
  static ValueAndSlope with_slope(Vector u) {
    const Vector s = sigmoid(u);
    return {s, s * (1.0F - s)};
  }
};

template <>
struct Factor<Nonlinearity::gelu> {
  static ValueAndSlope with_slope(Vector u) {
    constexpr float kInverseSqrt2Pi = 0.39894228040143267794F;
    const auto [below, density] = normal(u);
    return {below, kInverseSqrt2Pi * density};
  }
};

// 0.5 (1 + tanh(z)) = sigmoid(2 z)
template <>
struct Factor<Nonlinearity::gelu_tanh> {
  static ValueAndSlope with_slope(Vector u) {
    constexpr float kTwoSqrt2OverPi = 1.59576912160573071176F;
    const Vector s = sigmoid(kTwoSqrt2OverPi * (u + 0.044715F * u * u * u));
    const Vector inner_slope = kTwoSqrt2OverPi * (1.0F + 3.0F * 0.044715F * u * u);
    return {s, s * (1.0F - s) * inner_slope};
  }
};

/// f and f'.
template <Nonlinearity f>
struct Formula {
  static ValueAndSlope with_slope(Vector u) {
    const auto [s, slope] = Factor<f>::with_slope(u);
    return {u * s, s + u * slope};
  }
};

// Without the product of an infinite u and a factor of 0.
template <>
struct Formula<Nonlinearity::relu> {
  static ValueAndSlope with_slope(Vector u) {
    const Vector zero{};
    return {u < 0.0F ? zero : u, u > 0.0F ? broadcast(1.0F) : zero};
  }
};

template <>
struct Formula<Nonlinearity::relu2> {
  static ValueAndSlope with_slope(Vector u) {
    const Vector zero{};
    const Vector positive = u < 0.0F ? zero : u;
    return {positive * positive, 2.0F * positive};
  }
};

/// c tanh(x / c), and its slope in x. Where |z| = |x / c| is below 0.625, tanh(z) is
/// z + z^3 q(z^2) with q fitted to a relative error of 5e-9, and elsewhere 1 - 2 / (exp(2 |z|) + 1).
inline ValueAndSlope softcap(Vector x, float c) {
  const Vector z = x * (1.0F / c);
  const Vector size = z < 0.0F ? -z : z;
  const Vector w = z * z;
  Vector q = broadcast(-0.0057049597706925765F);
  q = q * w + 0.020639060422137423F;
  q = q * w - 0.05373970585778019F;
  q = q * w + 0.13331442070260674F;
  q = q * w - 0.33333281936254977F;
  const Vector near = z + z * w * q;
  const Vector rest = 2.0F / (exp(2.0F * size) + 1.0F);  // 1 - tanh(|z|)
  const Vector far = z < 0.0F ? rest - 1.0F : 1.0F - rest;
  return {c * (size < 0.625F ? near : far),
          size < 0.625F ? 1.0F - near * near : rest * (2.0F - rest)};
}

/// The product with a factor of 0 is 0, also that of infinity.
inline Vector times_factor(Vector x, Vector factor) {
  const Vector zero{};
  return factor == 0.0F ? zero : x * factor;
}

/// An activation and its derivatives by both pre-activations.
struct ActivatedValue {
  Vector value;
  Vector by_gate;
  Vector by_up;
};

/// f(gate).
template <Nonlinearity f>
struct Plain {
  static constexpr bool kIsGated = false;
  explicit Plain(const Gating&) {}

  ActivatedValue operator()(Vector gate, Vector) const {
    const auto [value, slope] = Formula<f>::with_slope(gate);
    return {value, slope, Vector{}};
  }
};

/// f(gate) * up.
template <Nonlinearity f>
struct PlainGate {
  static constexpr bool kIsGated = true;
  explicit PlainGate(const Gating&) {}

  ActivatedValue operator()(Vector gate, Vector up) const {
    const auto [value, slope] = Formula<f>::with_slope(gate);
    return {value * up, up * slope, value};
  }
};

/// All that Gating says.
template <Nonlinearity f>
class ShapedGate {
 public:
  static constexpr bool kIsGated = true;
  explicit ShapedGate(const Gating& gating)
      : alpha_(static_cast<float>(gating.alpha)),
        limit_(static_cast<float>(gating.limit)),
        up_offset_(static_cast<float>(gating.up_offset)),
        gate_softcap_(static_cast<float>(gating.gate_softcap)),
        up_softcap_(static_cast<float>(gating.up_softcap)) {}

  ActivatedValue operator()(Vector gate, Vector up) const {
    const Vector zero{}, limit = broadcast(limit_);
    const Vector g = gate > limit ? limit : gate;
    const Vector v = up > limit ? limit : (up < -limit ? -limit : up);
    const auto [s, s_slope] = Factor<f>::with_slope(alpha_ * g);
    const auto [linear, linear_slope] = capped(g, gate_softcap_);
    const auto [bent, bent_slope] = capped(v, up_softcap_);
    const Vector of_gate = times_factor(linear, s);
    const Vector slope = linear_slope * s + times_factor(linear, alpha_ * s_slope);
    const Vector of_up = bent + up_offset_;
    return {of_gate * of_up,
            gate > limit ? zero : slope * of_up,
            up > limit ? zero : (up < -limit ? zero : of_gate * bent_slope)};
  }

 private:
  static ValueAndSlope capped(Vector x, float c) {
    return c == __builtin_inff() ? ValueAndSlope{x, broadcast(1.0F)} : softcap(x, c);
  }

  float alpha_, limit_, up_offset_, gate_softcap_, up_softcap_;
};

/// Calls body with how an activation is formed.
template <typename Body>
void with_activated(Nonlinearity f, const Gating& gating, bool is_gated, const Body& body) {
#define TORCHMOE_CASE(name, f, kind, doc)                                                       \
  TORCHMOE_IF_PLAIN_##kind(                                                                     \
      case Nonlinearity::name                                                                   \
      : if (!is_gated) { body(Plain<Nonlinearity::name>(gating)); } else if (gating.is_plain) { \
        body(PlainGate<Nonlinearity::name>(gating));                                            \
      } else { body(ShapedGate<Nonlinearity::name>(gating)); } return;)
  switch (f) { TORCHMOE_ACTIVATIONS(TORCHMOE_CASE) }
#undef TORCHMOE_CASE
}

template <typename T>
const T* at(Numbers numbers, int64_t i) {
  return static_cast<const T*>(numbers.data) + i;
}

template <typename T>
T* at(MutableNumbers numbers, int64_t i) {
  return static_cast<T*>(numbers.data) + i;
}

/// Calls body(column, how many) for whole vectors of [begin, end), whose number is a constant, and for
/// the rest.
template <typename Body>
inline void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t c = begin;
  for (; c + kWidth <= end; c += kWidth) {
    body(c, std::integral_constant<int64_t, kWidth>{});
  }
  if (c < end) {
    body(c, end - c);
  }
}

// ---- Columns of gates and values, side by side or alternating ------------------------------------

struct Pair {
  Vector gate;
  Vector up;
};

/// The places of either half's elements where they alternate among those of two vectors.
template <int first, int... place>
inline Vector every_other(Vector a, Vector b, std::integer_sequence<int, place...>) {
  return __builtin_shufflevector(a, b, (2 * place + first)...);
}
template <int first, int... place>
inline Vector alternating(Vector a, Vector b, std::integer_sequence<int, place...>) {
  constexpr int kHalf = first * static_cast<int>(kWidth) / 2;
  return __builtin_shufflevector(
      a, b, (kHalf + place / 2 + place % 2 * static_cast<int>(kWidth))...);
}

using Places = std::make_integer_sequence<int, kWidth>;

/// Elements of a row from column c on; with a step of 2 every other one.
template <bool is_gated, typename T>
inline Pair load_columns(const T* gates, const T* ups, int64_t step, int64_t c, int64_t count) {
  if constexpr (!is_gated) {
    return {load_up_to(gates + c, count), Vector{}};
  } else if (step == 1) {
    return {load_up_to(gates + c, count), load_up_to(ups + c, count)};
  } else {
    const T* from = gates + 2 * c;
    const Vector low = load_up_to(from, 2 * count);
    const Vector high = 2 * count > kWidth ? load_up_to(from + kWidth, 2 * count - kWidth) : low;
    return {every_other<0>(low, high, Places{}), every_other<1>(low, high, Places{})};
  }
}

template <bool is_gated, typename T>
inline void store_columns(
    const Pair& pair, T* gates, T* ups, int64_t step, int64_t c, int64_t count) {
  if (step == 1) {
    store_up_to(pair.gate, gates + c, count);
    if constexpr (is_gated) {
      store_up_to(pair.up, ups + c, count);
    }
  } else {
    T* to = gates + 2 * c;
    store_up_to(alternating<0>(pair.gate, pair.up, Places{}), to, 2 * count);
    if (2 * count > kWidth) {
      store_up_to(alternating<1>(pair.gate, pair.up, Places{}), to + kWidth, 2 * count - kWidth);
    }
  }
}

template <typename Activated, typename T>
void activate_rows(const ActivateCall& call, const Activated& activated) {
  constexpr bool kIsGated = Activated::kIsGated;
  const T* gate_bias = at<T>(call.gate_bias, 0);
  const T* up_bias = at<T>(call.up_bias, 0);
  for (int64_t r = 0; r < call.rows; ++r) {
    const float* gates = call.gate + r * call.stride;
    const float* ups = kIsGated ? call.up + r * call.stride : nullptr;
    for_vectors(0, call.columns, [&](int64_t c, auto count) {
      Pair pre = load_columns<kIsGated>(gates, ups, call.step, c, count);
      if (gate_bias != nullptr) {
        const Pair bias = load_columns<kIsGated>(gate_bias, up_bias, call.step, c, count);
        pre = {pre.gate + bias.gate, pre.up + bias.up};
      }
      if (call.pre_gate.data != nullptr) {
        const int64_t row = r * call.pre_stride;
        T* pre_up = kIsGated ? at<T>(call.pre_up, row) : nullptr;
        store_columns<kIsGated>(pre, at<T>(call.pre_gate, row), pre_up, call.step, c, count);
      }
      store_up_to(
          activated(pre.gate, pre.up).value, at<T>(call.act, r * call.act_stride + c), count);
    });
  }
}

template <typename Activated, typename T>
void activate_backward_rows(const ActivateBackwardCall& call, const Activated& activated) {
  constexpr bool kIsGated = Activated::kIsGated;
  for (int64_t r = 0; r < call.rows; ++r) {
    const T* gates = at<T>(call.pre_gate, r * call.pre_stride);
    const T* ups = kIsGated ? at<T>(call.pre_up, r * call.pre_stride) : nullptr;
    T* grad_gates = at<T>(call.grad_gate, r * call.grad_pre_stride);
    T* grad_ups = kIsGated ? at<T>(call.grad_up, r * call.grad_pre_stride) : nullptr;
    const float weight = call.weights[r];
    float* dots = call.dots + r * call.dots_stride;
    for (int64_t first = 0; first < call.columns; first += kDotColumns) {
      Vector dot{};
      for_vectors(first, min(first + kDotColumns, call.columns), [&](int64_t c, auto count) {
        const Vector grad_act = load_up_to(call.grad_act + r * call.grad_act_stride + c, count);
        const Pair pre = load_columns<kIsGated>(gates, ups, call.step, c, count);
        const auto [act, by_gate, by_up] = activated(pre.gate, pre.up);
        const Vector weighted = weight * grad_act;
        store_columns<kIsGated>(
            Pair{weighted * by_gate, weighted * by_up}, grad_gates, grad_ups, call.step, c, count);
        dot += grad_act * act;
        store_up_to(weight * act, at<T>(call.weighted_act, r * call.act_stride + c), count);
      });
      *dots++ = sum(dot);
    }
  }
}

}  // namespace

void activate(const ActivateCall& call) {
  with_activated(call.f, call.gating, call.up != nullptr, [&]<typename Activated>(Activated of) {
    with_type(call.pre_gate.type,
              [&]<typename T>(const T*) { activate_rows<Activated, T>(call, of); });
  });
}

void activate_backward(const ActivateBackwardCall& call) {
  const bool is_gated = call.pre_up.data != nullptr;
  with_activated(call.f, call.gating, is_gated, [&]<typename Activated>(Activated of) {
    with_type(call.pre_gate.type,
              [&]<typename T>(const T*) { activate_backward_rows<Activated, T>(call, of); });
  });
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
