// The experts' activations: the table from which the enumeration, the switches, the names in Python
// and the tests' lists follow. The formulas of f are found by its name: common/activation.h has the
// scalar ones, cpu/simd/activation.cpp those on vectors.
#pragma once

/// X(name, f, kind, doc): a plain activation is f of its pre-activation, and f is its own name; a
/// gated one is f of the gate times the value, f being the name of a plain one.
#define TORCHMOE_ACTIVATIONS(X)                                          \
  X(gelu, gelu, plain, "u Phi(u), Phi the normal distribution function") \
  X(gelu_tanh, gelu_tanh, plain, "gelu with a tanh in the place of erf") \
  X(relu, relu, plain, "max(u, 0)")                                      \
  X(relu2, relu2, plain, "max(u, 0)^2")                                  \
  X(silu, silu, plain, "u / (1 + exp(-u))")                              \
  X(swiglu, silu, gated, "silu(gate) * up")                              \
  X(geglu, gelu, gated, "gelu(gate) * up")                               \
  X(geglu_tanh, gelu_tanh, gated, "gelu_tanh(gate) * up")                \
  X(reglu, relu, gated, "relu(gate) * up")

namespace torchmoe {

#define TORCHMOE_ACTIVATION_NAME(name, ...) name,
enum class Activation { TORCHMOE_ACTIVATIONS(TORCHMOE_ACTIVATION_NAME) };
#undef TORCHMOE_ACTIVATION_NAME

enum class ActivationKind { plain, gated };

/// The functions f: the names of the plain activations.
#define TORCHMOE_IF_PLAIN_plain(...) __VA_ARGS__
#define TORCHMOE_IF_PLAIN_gated(...)
#define TORCHMOE_NONLINEARITY(name, f, kind, doc) TORCHMOE_IF_PLAIN_##kind(name, )
enum class Nonlinearity { TORCHMOE_ACTIVATIONS(TORCHMOE_NONLINEARITY) };
#undef TORCHMOE_NONLINEARITY

/// What gated activations do besides f(gate) * up; every f is u times a factor s(u).
///
///     a = softcap(g, gate_softcap) * s(alpha * g) * (softcap(v, up_softcap) + up_offset)
///     g = min(gate, limit),  v = up within [-limit, limit],  softcap(x, c) = c * tanh(x / c)
///
/// An infinite limit or cap changes nothing.
struct Gating {
  double alpha;
  double limit;
  double up_offset;
  double gate_softcap;
  double up_softcap;
  bool is_plain;     // a = f(gate) * up
  bool interleaved;  // gate and up alternate among the columns, instead of lying in two halves
};

}  // namespace torchmoe
