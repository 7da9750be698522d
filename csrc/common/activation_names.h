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
  X(silu, silu, plain, "u / (1 + exp(-u))")                              \
  X(swiglu, silu, gated, "silu(gate) * up")                              \
  X(geglu, gelu, gated, "gelu(gate) * up")                               \
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

}  // namespace torchmoe
