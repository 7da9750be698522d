// The experts' feed-forward networks over rows in expert order: what lies beside the plain products
// of gemm/grouped_product.h. Used by expert_mlp and attach_dense_gradient.
#pragma once

#include <ATen/OpMathType.h>

#include "common/activation.h"
#include "cuda/gemm/tile_map.h"
#include "cuda/plan.h"

namespace torchmoe::cuda {

/// For every row its token and its slot's weight (null row_weights: not wanted); -1 and 0 for a row
/// that no slot owns.
template <typename Acc>
void read_plan_rows(
    Stream stream, const Plan& plan, const Acc* weights, int64_t* tokens, Acc* row_weights);

/// pre = x[token of the row] w_in[e]^T + b_in[e], act = activation(pre) formed before pre is
/// rounded: x [T, H], w_in [E, P, H], b_in [E, P] or null -> pre [N, P] (null: not kept), act [N,
/// I] (null: not wanted). Rows that no expert owns are not touched.
template <typename T>
void project_up(Stream stream,
                const TileMap& map,
                Activation activation,
                const T* x,
                const int64_t* tokens,
                const T* w_in,
                const T* b_in,
                T* pre,
                T* act,
                int64_t hidden,
                int64_t intermediate);

/// In how many parts a row's <dA', a> is formed: one for each tile of its columns.
template <typename T>
int64_t dot_parts(int64_t intermediate);

/// With dA' = grad[token of the row] w_out[e] (the weight not yet in) and a = activation(pre):
///
///     dots [N, parts]      <dA', a>, in parts
///     weighted_act [N, I]  weight * a, for w_out's gradient
///     grad_pre [N, P]      weight * dA' * da/dpre
///
/// grad [T, H], w_out [E, H, I], pre [N, P], row_weights [N]; the last two results may be null.
/// Rows that no expert owns are not touched.
template <typename T>
void project_down_backward(Stream stream,
                           const TileMap& map,
                           Activation activation,
                           const T* grad,
                           const int64_t* tokens,
                           const T* w_out,
                           const T* pre,
                           const at::opmath_type<T>* row_weights,
                           at::opmath_type<T>* dots,
                           T* weighted_act,
                           T* grad_pre,
                           int64_t hidden,
                           int64_t intermediate);

/// grad_weights[slot] = the sum of its row's dots + <grad[token], b_out[e]> (null b_out: nothing);
/// 0 for a slot that is not routed.
template <typename T>
void finish_grad_weights(Stream stream,
                         const Plan& plan,
                         const TileMap& map,
                         const at::opmath_type<T>* dots,
                         const T* grad,
                         const T* b_out,
                         at::opmath_type<T>* grad_weights,
                         int64_t hidden,
                         int64_t intermediate);

}  // namespace torchmoe::cuda
