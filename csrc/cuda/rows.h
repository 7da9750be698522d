// Moving tokens into expert order and back: the launchers shared by permute, unpermute and
// expert_mlp.
//
// T is the stored type, its opmath type (float for the 16-bit types) the one that sums are formed
// in.
#pragma once

#include <ATen/OpMathType.h>

#include "cuda/plan.h"
#include "cuda/stream.h"

namespace torchmoe::cuda {

/// rows[r] = x[token of row r], 0 for unrouted rows: x [T, width] -> rows [N, width].
template <typename T>
void gather_rows(Stream stream, const Plan& plan, const T* x, T* rows, int64_t width);

/// y[t] = sum over routed slots, in slot order, of weights[t, j] * rows[row of the slot]; null
/// weights count as 1. Rows are of T or of its opmath type.
template <typename T, typename In>
void combine_rows(Stream stream,
                  const Plan& plan,
                  const In* rows,
                  const at::opmath_type<T>* weights,
                  T* y,
                  int64_t width);

/// unpermute's derivative: grad_rows[r] = weight of its slot * grad[its token], and the slot's
/// grad_weights = <grad[its token], rows[r]>; both 0 for what is not routed.
template <typename T>
void combine_rows_backward(Stream stream,
                           const Plan& plan,
                           const T* grad,
                           const T* rows,
                           const at::opmath_type<T>* weights,
                           T* grad_rows,
                           at::opmath_type<T>* grad_weights,
                           int64_t width);

}  // namespace torchmoe::cuda
