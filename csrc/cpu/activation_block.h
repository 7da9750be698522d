// The experts' activation, forward and backward, over a block of rows and columns.
//
// T is the stored type, which what lies between two products is rounded to; Acc, float or double, the
// type of the arithmetic. That of float32 is in cpu/simd.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/activation.h"
#include "cpu/gemm/product.h"

namespace torchmoe::cpu {

/// A product's gate and up columns become the pre-activation and the activation. `up` and what
/// belongs to it are null for a plain activation, a bias where there is none, pre_gate and pre_up
/// where they are not needed.
template <typename T, typename Acc>
struct ActivationBlock {
  int64_t rows;
  int64_t columns;
  const Acc* gate;  // [rows, columns]
  const Acc* up;
  int64_t stride;      // of gate and up
  const T* gate_bias;  // [columns]
  const T* up_bias;
  T* pre_gate;  // [rows, columns]
  T* pre_up;
  int64_t pre_stride;
  T* act;  // [rows, columns]
  int64_t act_stride;
};

template <typename T, typename Acc>
void activate_block(Activation activation, const ActivationBlock<T, Acc>& block) {
  if constexpr (std::is_same_v<Acc, float>) {
    return simd().activate({nonlinearity_of(activation),
                            block.rows,
                            block.columns,
                            block.gate,
                            block.up,
                            block.stride,
                            numbers(block.gate_bias),
                            numbers(block.up_bias),
                            numbers(block.pre_gate),
                            numbers(block.pre_up),
                            block.pre_stride,
                            numbers(block.act),
                            block.act_stride});
  }
  with_nonlinearity(nonlinearity_of(activation), [&](auto f) {
    for (int64_t r = 0; r < block.rows; ++r) {
      for (int64_t c = 0; c < block.columns; ++c) {
        const int64_t product = r * block.stride + c;
        const int64_t pre = r * block.pre_stride + c;
        Acc gate = block.gate[product];
        if (block.gate_bias != nullptr) {
          gate += static_cast<Acc>(block.gate_bias[c]);
        }
        if (block.pre_gate != nullptr) {
          block.pre_gate[pre] = static_cast<T>(gate);
        }
        Acc act = f.value(gate);
        if (block.up != nullptr) {
          Acc up = block.up[product];
          if (block.up_bias != nullptr) {
            up += static_cast<Acc>(block.up_bias[c]);
          }
          if (block.pre_up != nullptr) {
            block.pre_up[pre] = static_cast<T>(up);
          }
          act *= up;
        }
        block.act[r * block.act_stride + c] = static_cast<T>(act);
      }
    }
  });
}

/// With dA' = dL/dy w_out (the weight not yet in):
///
///     dots           <dA', a>                       each stretch of columns' share of the weight's
///                                                   gradient
///     weighted_act   weight * a                     for w_out's gradient
///     grad_gate, _up weight * dA' * da/dpre
template <typename T, typename Acc>
struct ActivationBackwardBlock {
  int64_t rows;
  int64_t columns;
  const Acc* grad_act;  // [rows, columns] = dA'
  int64_t grad_act_stride;
  const T* pre_gate;  // [rows, columns]
  const T* pre_up;    // null for a plain activation
  int64_t pre_stride;
  const Acc* weights;  // [rows]
  T* weighted_act;     // [rows, columns]
  int64_t act_stride;
  T* grad_gate;  // [rows, columns]
  T* grad_up;
  int64_t grad_pre_stride;
  Acc* dots;  // [rows, dots_of(columns)]
  int64_t dots_stride;
};

template <typename T, typename Acc>
void activate_block_backward(Activation activation, const ActivationBackwardBlock<T, Acc>& block) {
  if constexpr (std::is_same_v<Acc, float>) {
    return simd().activate_backward({nonlinearity_of(activation),
                                     block.rows,
                                     block.columns,
                                     block.grad_act,
                                     block.grad_act_stride,
                                     numbers(block.pre_gate),
                                     numbers(block.pre_up),
                                     block.pre_stride,
                                     block.weights,
                                     numbers(block.weighted_act),
                                     block.act_stride,
                                     numbers(block.grad_gate),
                                     numbers(block.grad_up),
                                     block.grad_pre_stride,
                                     block.dots,
                                     block.dots_stride});
  }
  with_nonlinearity(nonlinearity_of(activation), [&](auto f) {
    for (int64_t r = 0; r < block.rows; ++r) {
      const Acc weight = block.weights[r];
      Acc* dots = block.dots + r * block.dots_stride;
      std::fill_n(dots, dots_of(block.columns), Acc(0));
      for (int64_t c = 0; c < block.columns; ++c) {
        const int64_t pre = r * block.pre_stride + c;
        const int64_t grad_pre = r * block.grad_pre_stride + c;
        const Acc grad_act = block.grad_act[r * block.grad_act_stride + c];
        const auto [value, slope] = f.with_slope(static_cast<Acc>(block.pre_gate[pre]));
        Acc act = value;
        if (block.pre_up != nullptr) {
          const Acc up = static_cast<Acc>(block.pre_up[pre]);
          act *= up;
          block.grad_gate[grad_pre] = static_cast<T>(weight * grad_act * up * slope);
          block.grad_up[grad_pre] = static_cast<T>(weight * grad_act * value);
        } else {
          block.grad_gate[grad_pre] = static_cast<T>(weight * grad_act * slope);
        }
        dots[c / kDotColumns] += grad_act * act;
        block.weighted_act[r * block.act_stride + c] = static_cast<T>(weight * act);
      }
    }
  });
}

/// One expert's w_in and its bias, from some column of the activation on.
template <typename T>
struct InputMatrix {
  const T* gate;
  const T* up;  // of a gated activation
  const T* gate_bias;
  const T* up_bias;
};

/// The expert's from the activation's column `column` on: w_in [P, hidden], b_in [P] or null.
template <typename T>
InputMatrix<T> input_matrix(Activation activation,
                            const T* w_in,
                            const T* b_in,
                            int64_t column,
                            int64_t intermediate,
                            int64_t hidden) {
  const bool gated = is_gated(activation);
  const int64_t up = column + intermediate;
  const auto bias = [&](int64_t i) { return b_in == nullptr ? nullptr : b_in + i; };
  return {w_in + column * hidden,
          gated ? w_in + up * hidden : nullptr,
          bias(column),
          gated ? bias(up) : nullptr};
}

/// A block of the activation from a block of tokens: `target` says how many rows and columns, and
/// where the results go; its gate and up are filled in here.
template <typename T, typename Acc>
void activated_product(Activation activation,
                       const Rows<T>& tokens,
                       const InputMatrix<T>& matrix,
                       int64_t hidden,
                       ActivationBlock<T, Acc> target,
                       Workspace& workspace) {
  const ProductSizes sizes{target.rows, target.columns, hidden};
  const auto half = [&](const T* weight, Scratch& scratch) {
    Acc* out = scratch.get<Acc>(sizes.m * sizes.n);
    const T* no_bias = nullptr;  // the activation adds it
    product(Form::nt, tokens, Rows<T>{weight, hidden}, sizes, no_bias, out, sizes.n, workspace);
    return out;
  };
  target.gate = half(matrix.gate, workspace.gate);
  target.up = is_gated(activation) ? half(matrix.up, workspace.up) : nullptr;
  target.stride = sizes.n;
  target.gate_bias = matrix.gate_bias;
  target.up_bias = matrix.up_bias;
  activate_block(activation, target);
}

}  // namespace torchmoe::cpu
