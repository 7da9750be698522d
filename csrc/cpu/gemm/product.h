// Matrix products of a task, whose operands are read where they lie: by rows, at a stride or by
// index, in their stored type.
//
// float32 and the 16-bit types, widened, go to the kernels of cpu/simd where the processor has them.
// float64 and other processors go to the library, after a copy of what it cannot read in place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <ATen/OpMathType.h>

#include "cpu/gemm/library_product.h"
#include "cpu/gemm/workspace.h"
#include "cpu/simd/simd.h"

namespace torchmoe::cpu {

/// Rows of contiguous elements: row i starts at data + (index ? index[i] : i) * stride. A negative
/// index is a row of zeros.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  const int64_t* index = nullptr;

  /// The rows from row i on, and of each the elements from element j on.
  Rows from(int64_t i, int64_t j) const {
    return index == nullptr ? Rows{data + i * stride + j, stride}
                            : Rows{data + j, stride, index + i};
  }

  /// Row i, null for one of zeros.
  const T* row(int64_t i) const {
    if (index == nullptr) {
      return data + i * stride;
    }
    return index[i] < 0 ? nullptr : data + index[i] * stride;
  }
};

/// out is [m, n]; every sum has k terms.
struct ProductSizes {
  int64_t m;
  int64_t n;
  int64_t k;
};

/// T as cpu/simd names it.
template <typename T>
constexpr Element element_of() {
#define TORCHMOE_ELEMENT(name, stored, type) \
  if constexpr (std::is_same_v<T, type>) {   \
    return Element::name;                    \
  } else
  TORCHMOE_ELEMENTS(TORCHMOE_ELEMENT) {
    static_assert(sizeof(T) == 0, "cpu/simd has no such numbers");
  }
#undef TORCHMOE_ELEMENT
}

template <typename T>
Numbers numbers(const T* data) {
  return {data, element_of<T>()};
}

template <typename T>
MutableNumbers numbers(T* data) {
  return {data, element_of<T>()};
}

template <typename T>
NumberRows number_rows(const Rows<T>& rows) {
  return {numbers(rows.data), rows.stride, rows.index};
}

/// The operand as the library reads it: [rows, width] of Acc.
template <typename T, typename Acc>
Matrix<const Acc> as_matrix(const Rows<T>& rows, int64_t count, int64_t width, Scratch& scratch) {
  if constexpr (std::is_same_v<T, Acc>) {
    if (rows.index == nullptr) {
      return {rows.data, count, width, rows.stride};
    }
  }
  Acc* copy = scratch.get<Acc>(count * width);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows.row(i);
    if (row == nullptr) {
      std::fill_n(copy + i * width, width, Acc(0));
    } else {
      std::copy_n(row, width, copy + i * width);
    }
  }
  return {copy, count, width, width};
}

/// out = the product of `left` and `right` in the form that says what their rows are. Acc is float
/// or double. Call it inside parallel_workers only.
template <typename L, typename R, typename Acc>
void product(Form form,
             const Rows<L>& left,
             const Rows<R>& right,
             const ProductSizes& sizes,
             Acc* out,
             int64_t out_stride,
             Workspace& workspace) {
  const auto [m, n, k] = sizes;
  if constexpr (std::is_same_v<Acc, float>) {
    if (const Simd* functions = simd()) {
      float* scratch = workspace.left.get<float>(functions->product_scratch);
      return functions->product(
          {form, number_rows(left), number_rows(right), m, n, k, out, out_stride, scratch});
    }
  }
  const bool left_has_terms = form == Form::tn;
  const bool right_has_terms = form != Form::nt;
  const auto a =
      as_matrix<L, Acc>(left, left_has_terms ? k : m, left_has_terms ? m : k, workspace.left);
  const auto b =
      as_matrix<R, Acc>(right, right_has_terms ? k : n, right_has_terms ? n : k, workspace.right);
  library_product<Acc>(left_has_terms ? a.transposed() : a,
                       right_has_terms ? b : b.transposed(),
                       {out, m, n, out_stride});
}

/// to = from, rounded to T.
template <typename Acc, typename T>
void store_numbers(const Acc* from, T* to, int64_t count) {
  if constexpr (std::is_same_v<Acc, float>) {
    if (const Simd* functions = simd()) {
      return functions->store(from, numbers(to), count);
    }
  }
  std::copy_n(from, count, to);
}

/// The same product, plus bias [n] where there is one, rounded to the type of `out`.
template <typename L, typename R, typename Out>
void product_plus_bias(Form form,
                       const Rows<L>& left,
                       const Rows<R>& right,
                       const ProductSizes& sizes,
                       const std::type_identity_t<R>* bias,
                       Out* out,
                       int64_t out_stride,
                       Workspace& workspace) {
  using Acc = at::opmath_type<L>;
  constexpr bool kInPlace = std::is_same_v<Out, Acc>;
  Acc* result = nullptr;
  int64_t stride = out_stride;
  if constexpr (kInPlace) {
    result = out;
  } else {
    result = workspace.result.get<Acc>(sizes.m * sizes.n);
    stride = sizes.n;
  }
  product(form, left, right, sizes, result, stride, workspace);
  if (!kInPlace || bias != nullptr) {
    for (int64_t i = 0; i < sizes.m; ++i) {
      Acc* row = result + i * stride;
      if (bias != nullptr) {
        for (int64_t j = 0; j < sizes.n; ++j) {
          row[j] += static_cast<Acc>(bias[j]);
        }
      }
      if constexpr (!kInPlace) {
        store_numbers(row, out + i * out_stride, sizes.n);
      }
    }
  }
}

}  // namespace torchmoe::cpu
