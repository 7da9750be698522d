// The experts' activations, by name alone.
#pragma once

namespace torchmoe {

enum class Activation { gelu, gelu_tanh, relu, silu, swiglu, geglu, reglu };

}  // namespace torchmoe
