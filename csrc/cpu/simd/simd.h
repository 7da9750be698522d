// What the CPU backend compiles once for each instruction set and chooses at run time.
//
// The sources of this room know no tensor and include no header whose inline functions another
// room compiles too: the linker keeps one copy of such a function, and a copy with instructions
// that a processor lacks must never be it.
#pragma once

#include <cstdint>

#include "common/activation_names.h"

namespace torchmoe::cpu {

/// X(name, this room's type, the library's type) of the stored elements whose sums are float32.
#define TORCHMOE_FLOAT32_ELEMENTS(X)   \
  X(float32, float, float)             \
  X(bfloat16, BFloat16, c10::BFloat16) \
  X(float16, Float16, c10::Half)
/// The same of all; sums of float64 are float64. A sum is rounded once.
#define TORCHMOE_ELEMENTS(X)   \
  TORCHMOE_FLOAT32_ELEMENTS(X) \
  X(float64, double, double)

#define TORCHMOE_ELEMENT_NAME(name, ...) name,
enum class Element { TORCHMOE_ELEMENTS(TORCHMOE_ELEMENT_NAME) };
#undef TORCHMOE_ELEMENT_NAME

/// Where elements are stored.
struct Numbers {
  const void* data;
  Element type;
};
struct MutableNumbers {
  void* data;
  Element type;
};

/// Rows of contiguous elements: row i starts at element (index ? index[i] : i) * stride of data. A
/// negative index is a row of zeros.
struct NumberRows {
  Numbers numbers;
  int64_t stride;
  const int64_t* index;
};

/// Which way the operands of a product lie. A row holds either all terms of the sums of one row (or
/// column) of the result, or one term of them all.
enum class Form {
  nt,  // out[i, j] = sum over k of left[i][k] right[j][k]
  nn,  // out[i, j] = sum over k of left[i][k] right[k][j]
  tn,  // out[i, j] = sum over k of left[k][i] right[k][j]
};

/// out [m, n] = the product plus bias. Both operands are of one type, or the left one is of float32
/// and the right one of 16 bits.
struct ProductCall {
  Form form;
  NumberRows left;
  NumberRows right;
  int64_t m;
  int64_t n;
  int64_t k;
  Numbers bias;        // [n] of right's type, data null: none
  MutableNumbers out;  // of right's type, or of float32 where that has 16 bits
  int64_t out_stride;
  void* scratch;  // Simd::product_scratch(call) bytes, aligned to 64
};

/// A block of the pre-activation's product becomes the pre-activation and the activation. What is
/// stored is of one type, pre_gate's, whether that is wanted or not; sums of it are float32. A gated
/// activation has both of its biases or neither, and so with pre.
struct ActivateCall {
  Nonlinearity f;
  Gating gating;  // of a gated activation
  int64_t rows;
  int64_t columns;
  const float* gate;  // [rows, columns], the product without the bias
  const float* up;    // the same of a gated activation, else null
  int64_t stride;     // of gate and up
  int64_t step;       // between columns of gate, up, the biases and pre; 2 where they alternate
  Numbers gate_bias;  // [columns], data null: none
  Numbers up_bias;
  MutableNumbers pre_gate;  // [rows, columns], data null: not wanted
  MutableNumbers pre_up;
  int64_t pre_stride;
  MutableNumbers act;  // [rows, columns]
  int64_t act_stride;
};

/// A row's <dA', a> is formed for each stretch of so many columns.
constexpr int64_t kDotColumns = 64;

/// How many stretches of kDotColumns the columns have.
constexpr int64_t dots_of(int64_t columns) {
  return (columns + kDotColumns - 1) / kDotColumns;
}

/// A block of dA' = dL/dy w_out goes backward through the activation. What is stored is of one type.
struct ActivateBackwardCall {
  Nonlinearity f;
  Gating gating;
  int64_t rows;
  int64_t columns;
  const float* grad_act;  // [rows, columns] = dA'
  int64_t grad_act_stride;
  Numbers pre_gate;  // [rows, columns]
  Numbers pre_up;    // the same of a gated activation, else data null
  int64_t pre_stride;
  int64_t step;                 // between columns of pre and its gradient
  const float* weights;         // [rows], each row's combine weight
  MutableNumbers weighted_act;  // [rows, columns] = weight * a
  int64_t act_stride;
  MutableNumbers grad_gate;  // [rows, columns] = weight * dA' * da/dpre
  MutableNumbers grad_up;
  int64_t grad_pre_stride;
  float* dots;  // [rows, columns / kDotColumns] = <dA', a> over each stretch of columns
  int64_t dots_stride;
};

/// out [width] = the sum of weights[i] * rows[i], in their order.
struct WeightedSumCall {
  int64_t count;
  const float* const* rows;  // [count]
  const float* weights;      // [count]
  int64_t width;
  MutableNumbers out;
  int64_t num_next;  // the rows of the next call, which the memory is asked for meanwhile
  const float* const* next;
};

/// out[i] = exp(values[i]) / sum of exp, 0 where every value is -inf and NaN where one is; the largest
/// is subtracted first. out may be values.
struct SoftmaxCall {
  int64_t size;
  const float* values;
  float* out;
};

/// The functions of one instruction set.
struct Simd {
  int64_t (*product_scratch)(const ProductCall&);  // does not read the call's scratch
  void (*product)(const ProductCall&);
  void (*activate)(const ActivateCall&);
  void (*activate_backward)(const ActivateBackwardCall&);
  void (*softmax)(const SoftmaxCall&);
  void (*weighted_sum)(const WeightedSumCall&);
  void (*store)(const float* from, MutableNumbers to, int64_t count);
};

/// Those of the best instruction set that the processor has and torch's own kernels may use.
const Simd& simd();

}  // namespace torchmoe::cpu
