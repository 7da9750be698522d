// The experts' activation, forward and backward, over a block of rows and columns.
//
// T is the stored type, which what lies between two products is rounded to; Acc, float or double, the
// type of the arithmetic. That of float32 is in cpu/simd.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/activation.h"
#include "cpu/gemm/matrices.h"

namespace torchmoe::cpu {

/// Where a pre-activation has what belongs to an activation's column.
struct PreColumns {
  int64_t gate;
  int64_t up;    // of a gated activation
  int64_t step;  // to what belongs to the next column

  PreColumns(const ChosenActivation& activation, int64_t column, int64_t intermediate)
      : gate(activation.is_interleaved() ? 2 * column : column),
        up(activation.is_interleaved() ? gate + 1 : gate + intermediate),
        step(activation.is_interleaved() ? 2 : 1) {}
};

/// Calls `body` with how the gated activation is formed.
template <typename Body>
void with_gate_of(const ChosenActivation& activation, const Body& body) {
  if (activation.gating.is_plain) {
    with_gate<PlainGate>(activation.f(), body);
  } else {
    with_gate<ShapedGate>(activation.f(), body);
  }
}

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
  int64_t step;        // between columns of gate, up, the biases and pre
  const T* gate_bias;  // [columns]
  const T* up_bias;
  T* pre_gate;  // [rows, columns]
  T* pre_up;
  int64_t pre_stride;
  T* act;  // [rows, columns]
  int64_t act_stride;
};

template <typename T, typename Acc>
void activate_block(const ChosenActivation& activation, const ActivationBlock<T, Acc>& block) {
  if constexpr (std::is_same_v<Acc, float>) {
    return simd().activate({activation.f(),
                            activation.gating,
                            block.rows,
                            block.columns,
                            block.gate,
                            block.up,
                            block.stride,
                            block.step,
                            numbers(block.gate_bias),
                            numbers(block.up_bias),
                            numbers(block.pre_gate),
                            numbers(block.pre_up),
                            block.pre_stride,
                            numbers(block.act),
                            block.act_stride});
  }
  const auto rows = [&](const auto& activated) {
    const auto with_bias = [](const Acc* product, const T* bias, int64_t at, int64_t c) {
      return product[at] + (bias == nullptr ? Acc(0) : static_cast<Acc>(bias[c]));
    };
    for (int64_t r = 0; r < block.rows; ++r) {
      for (int64_t i = 0; i < block.columns; ++i) {
        const int64_t c = i * block.step;
        const int64_t product = r * block.stride + c;
        const int64_t pre = r * block.pre_stride + c;
        const Acc gate = with_bias(block.gate, block.gate_bias, product, c);
        if (block.pre_gate != nullptr) {
          block.pre_gate[pre] = static_cast<T>(gate);
        }
        Acc up = 0;
        if (block.up != nullptr) {
          up = with_bias(block.up, block.up_bias, product, c);
          if (block.pre_up != nullptr) {
            block.pre_up[pre] = static_cast<T>(up);
          }
        }
        block.act[r * block.act_stride + i] = static_cast<T>(activated(gate, up));
      }
    }
  };
  if (activation.is_gated()) {
    with_gate_of(activation, [&](auto gated) {
      rows([&](Acc gate, Acc up) { return gated.value(activation.gating, gate, up); });
    });
  } else {
    with_nonlinearity(activation.f(),
                      [&](auto f) { rows([&](Acc gate, Acc) { return f.value(gate); }); });
  }
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
  int64_t step;        // between columns of pre and its gradient
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
void activate_block_backward(const ChosenActivation& activation,
                             const ActivationBackwardBlock<T, Acc>& block) {
  if constexpr (std::is_same_v<Acc, float>) {
    return simd().activate_backward({activation.f(),
                                     activation.gating,
                                     block.rows,
                                     block.columns,
                                     block.grad_act,
                                     block.grad_act_stride,
                                     numbers(block.pre_gate),
                                     numbers(block.pre_up),
                                     block.pre_stride,
                                     block.step,
                                     block.weights,
                                     numbers(block.weighted_act),
                                     block.act_stride,
                                     numbers(block.grad_gate),
                                     numbers(block.grad_up),
                                     block.grad_pre_stride,
                                     block.dots,
                                     block.dots_stride});
  }
  const auto rows = [&](const auto& with_slopes) {
    for (int64_t r = 0; r < block.rows; ++r) {
      const Acc weight = block.weights[r];
      Acc* dots = block.dots + r * block.dots_stride;
      std::fill_n(dots, dots_of(block.columns), Acc(0));
      for (int64_t i = 0; i < block.columns; ++i) {
        const int64_t pre = r * block.pre_stride + i * block.step;
        const int64_t grad_pre = r * block.grad_pre_stride + i * block.step;
        const Acc grad_act = block.grad_act[r * block.grad_act_stride + i];
        const Acc weighted = weight * grad_act;
        const Acc gate = static_cast<Acc>(block.pre_gate[pre]);
        const Acc up = block.pre_up == nullptr ? Acc(0) : static_cast<Acc>(block.pre_up[pre]);
        const GatedValue<Acc> act = with_slopes(gate, up);
        block.grad_gate[grad_pre] = static_cast<T>(weighted * act.by_gate);
        if (block.pre_up != nullptr) {
          block.grad_up[grad_pre] = static_cast<T>(weighted * act.by_up);
        }
        dots[i / kDotColumns] += grad_act * act.value;
        block.weighted_act[r * block.act_stride + i] = static_cast<T>(weight * act.value);
      }
    }
  };
  if (activation.is_gated()) {
    with_gate_of(activation, [&](auto gated) {
      rows([&](Acc gate, Acc up) { return gated.with_slopes(activation.gating, gate, up); });
    });
  } else {
    with_nonlinearity(activation.f(), [&](auto f) {
      rows([&](Acc gate, Acc) {
        const auto [value, slope] = f.with_slope(gate);
        return GatedValue<Acc>{value, slope, Acc(0)};
      });
    });
  }
}

/// One expert's w_in and its bias, null for none, from the activation's column `column` on.
template <typename T>
struct InputColumns {
  Matrices<const T> w_in;
  const T* b_in;
  int64_t column;
  int64_t intermediate;
};

/// A block of the activation from a block of tokens: `target` says how many rows and columns, and
/// where the results go; what they are formed of is filled in here.
template <typename T, typename Acc>
void activated_product(const ChosenActivation& activation,
                       const Rows<T>& tokens,
                       const InputColumns<T>& input,
                       int64_t hidden,
                       ActivationBlock<T, Acc> target,
                       Workspace& workspace) {
  const PreColumns columns(activation, input.column, input.intermediate);
  // Gates and values that alternate are one product's columns.
  const ProductSizes sizes{target.rows, columns.step * target.columns, hidden};
  const auto product_from = [&](int64_t first, Scratch& scratch) {
    Acc* out = scratch.get<Acc>(sizes.m * sizes.n);
    const T* no_bias = nullptr;  // the activation adds it
    times_transposed(tokens, input.w_in.from(first, 0), sizes, no_bias, out, sizes.n, workspace);
    return out;
  };
  target.gate = product_from(columns.gate, workspace.gate);
  if (activation.is_interleaved()) {
    target.up = target.gate + 1;
  } else if (activation.is_gated()) {
    target.up = product_from(columns.up, workspace.up);
  }
  target.stride = sizes.n;
  target.step = columns.step;
  if (input.b_in != nullptr) {
    target.gate_bias = input.b_in + columns.gate;
    target.up_bias = activation.is_gated() ? input.b_in + columns.up : nullptr;
  }
  activate_block(activation, target);
}

}  // namespace torchmoe::cpu
