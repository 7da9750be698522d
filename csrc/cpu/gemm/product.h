// Matrix products of a task, whose operands are read where they lie: by rows, at a stride or by
// index, in their stored type. cpu/simd has the kernels.
#pragma once

#include <cstdint>
#include <type_traits>

#include <ATen/OpMathType.h>

#include "cpu/elements.h"
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

template <typename T>
NumberRows number_rows(const Rows<T>& rows) {
  return {numbers(rows.data), rows.stride, rows.index};
}

/// The type of a sum of T.
template <typename T>
using Sum = at::opmath_type<T>;

/// out = the product of `left` and `right`, in the form that says what their rows are, plus bias [n]
/// where there is one, rounded once. Sums of 16-bit operands are float32. The operands are of one
/// type, or the left one is float32; out is of right's type or of that of its sums.
template <typename L, typename R, typename Out>
void product(Form form,
             const Rows<L>& left,
             const Rows<R>& right,
             const ProductSizes& sizes,
             const std::type_identity_t<R>* bias,
             Out* out,
             int64_t out_stride,
             Workspace& workspace) {
  static_assert(std::is_same_v<L, R> || std::is_same_v<L, Sum<R>>);
  static_assert(std::is_same_v<Out, R> || std::is_same_v<Out, Sum<R>>);
  ProductCall call{form,
                   number_rows(left),
                   number_rows(right),
                   sizes.m,
                   sizes.n,
                   sizes.k,
                   numbers(bias),
                   numbers(out),
                   out_stride,
                   /*scratch=*/nullptr};
  call.scratch = workspace.product.get<char>(simd().product_scratch(call));
  simd().product(call);
}

}  // namespace torchmoe::cpu
