// The experts' activations on vectors; common/activation.h has the formulas.
#include "cpu/simd/activation.h"

#include <type_traits>

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

/// f and f' of a nonlinearity.
template <Nonlinearity f>
struct Formula;

template <>
struct Formula<Nonlinearity::relu> {
  static ValueAndSlope with_slope(Vector u) {
    const Vector zero{};
    return {u < 0.0F ? zero : u, u > 0.0F ? broadcast(1.0F) : zero};
  }
};

template <>
struct Formula<Nonlinearity::silu> {
  static ValueAndSlope with_slope(Vector u) {
    const Vector s = sigmoid(u);
    return {u * s, s * (1.0F + u * (1.0F - s))};
  }
};

template <>
struct Formula<Nonlinearity::gelu> {
  static ValueAndSlope with_slope(Vector u) {
    constexpr float kInverseSqrt2Pi = 0.39894228040143267794F;
    const auto [below, density] = normal(u);
    return {u * below, below + u * kInverseSqrt2Pi * density};
  }
};

// 0.5 (1 + tanh(z)) = sigmoid(2 z)
template <>
struct Formula<Nonlinearity::gelu_tanh> {
  static ValueAndSlope with_slope(Vector u) {
    constexpr float kTwoSqrt2OverPi = 1.59576912160573071176F;
    const Vector s = sigmoid(kTwoSqrt2OverPi * (u + 0.044715F * u * u * u));
    const Vector inner_slope = kTwoSqrt2OverPi * (1.0F + 3.0F * 0.044715F * u * u);
    return {u * s, s + u * s * (1.0F - s) * inner_slope};
  }
};

template <typename Body>
void with_nonlinearity(Nonlinearity f, const Body& body) {
#define TORCHMOE_CASE(name, f, kind, doc) \
  TORCHMOE_IF_PLAIN_##kind(case Nonlinearity::name : return body(Formula<Nonlinearity::name>{});)
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

template <typename F, typename T>
void activate_rows(const ActivateCall& call) {
  const auto with_bias = [](Vector product, Numbers bias, int64_t c, int64_t count) {
    return bias.data == nullptr ? product : product + load_up_to(at<T>(bias, c), count);
  };
  for (int64_t r = 0; r < call.rows; ++r) {
    const float* gates = call.gate + r * call.stride;
    const float* ups = call.up == nullptr ? nullptr : call.up + r * call.stride;
    for_vectors(0, call.columns, [&](int64_t c, auto count) {
      const int64_t pre = r * call.pre_stride + c;
      const Vector gate = with_bias(load_up_to(gates + c, count), call.gate_bias, c, count);
      if (call.pre_gate.data != nullptr) {
        store_up_to(gate, at<T>(call.pre_gate, pre), count);
      }
      Vector act = F::with_slope(gate).value;
      if (ups != nullptr) {
        const Vector up = with_bias(load_up_to(ups + c, count), call.up_bias, c, count);
        if (call.pre_up.data != nullptr) {
          store_up_to(up, at<T>(call.pre_up, pre), count);
        }
        act *= up;
      }
      store_up_to(act, at<T>(call.act, r * call.act_stride + c), count);
    });
  }
}

template <typename F, typename T>
void activate_backward_rows(const ActivateBackwardCall& call) {
  for (int64_t r = 0; r < call.rows; ++r) {
    const T* gates = at<T>(call.pre_gate, r * call.pre_stride);
    const T* ups = call.pre_up.data == nullptr ? nullptr : at<T>(call.pre_up, r * call.pre_stride);
    const float weight = call.weights[r];
    float* dots = call.dots + r * call.dots_stride;
    for (int64_t first = 0; first < call.columns; first += kDotColumns) {
      Vector dot{};
      for_vectors(first, min(first + kDotColumns, call.columns), [&](int64_t c, auto count) {
        const Vector grad_act = load_up_to(call.grad_act + r * call.grad_act_stride + c, count);
        const auto [value, slope] = F::with_slope(load_up_to(gates + c, count));
        const Vector weighted = weight * grad_act;
        T* grad_gate = at<T>(call.grad_gate, r * call.grad_pre_stride + c);
        Vector act = value;
        if (ups != nullptr) {
          const Vector up = load_up_to(ups + c, count);
          act *= up;
          store_up_to(weighted * up * slope, grad_gate, count);
          store_up_to(weighted * value, at<T>(call.grad_up, r * call.grad_pre_stride + c), count);
        } else {
          store_up_to(weighted * slope, grad_gate, count);
        }
        dot += grad_act * act;
        store_up_to(weight * act, at<T>(call.weighted_act, r * call.act_stride + c), count);
      });
      *dots++ = sum(dot);
    }
  }
}

}  // namespace

void activate(const ActivateCall& call) {
  with_nonlinearity(call.f, [&]<typename F>(F) {
    with_type(call.pre_gate.type, [&]<typename T>(const T*) { activate_rows<F, T>(call); });
  });
}

void activate_backward(const ActivateBackwardCall& call) {
  with_nonlinearity(call.f, [&]<typename F>(F) {
    with_type(call.pre_gate.type,
              [&]<typename T>(const T*) { activate_backward_rows<F, T>(call); });
  });
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
