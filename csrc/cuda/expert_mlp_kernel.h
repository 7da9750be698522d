// The experts' feed-forward networks over rows in expert order: what is added to the plain products
// of gemm/grouped_product.h. Used by expert_mlp and attach_dense_gradient.
#pragma once

#include <ATen/OpMathType.h>

#include "common/activation.h"
#include "cuda/gemm/grouped_product.h"
#include "cuda/plan.h"

namespace torchmoe::cuda {

/// For every row its token and its slot's weight (null row_weights: not wanted); -1 and 0 for a row
/// that no slot owns.
template <typename Acc>
void read_plan_rows(
    Stream stream, const Plan& plan, const Acc* weights, int64_t* tokens, Acc* row_weights);

/// pre = x[token of the row] w_in[e]^T + b_in[e], act = activation(pre) formed before pre is
/// rounded. Rows that no expert owns are not touched.
template <typename T>
struct ProjectUp {
  ChosenActivation activation;
  SourceRows<T> x;         // [T, H] by the rows' tokens
  Matrices<const T> w_in;  // [E, P, H]
  const T* b_in;           // [E, P]; null: none
  T* pre;                  // [N, P]; null: not kept
  T* act;                  // [N, I]; null: not wanted
  int64_t hidden;
  int64_t intermediate;
};
template <typename T>
void project_up(Stream stream, const TileMap& map, const ProjectUp<T>& step);

/// In how many parts a row's <dA', a> is formed: one for each tile of its columns.
template <typename T>
int64_t dot_parts(int64_t intermediate);

/// dA' = grad[token of the row] w_out[e] (the weight not yet in) goes backward through a =
/// activation(pre). Rows that no expert owns are not touched.
template <typename T>
struct ProjectDownBackward {
  ChosenActivation activation;
  SourceRows<T> grad;                     // [T, H] by the rows' tokens
  Matrices<const T> w_out;                // [E, H, I]
  const T* pre;                           // [N, P]
  const at::opmath_type<T>* row_weights;  // [N]; null: 1
  at::opmath_type<T>* dots;               // [N, parts], <dA', a>
  T* weighted_act;  // [N, I], weight * a, for w_out's gradient; null: not wanted
  T* grad_pre;      // [N, P], weight * dA' * da/dpre; null: not wanted
  int64_t hidden;
  int64_t intermediate;
};
template <typename T>
void project_down_backward(Stream stream, const TileMap& map, const ProjectDownBackward<T>& step);

/// grad_weights[slot] = the sum of its row's dots + <grad[token], b_out[e]>; 0 for a slot that is
/// not routed.
template <typename T>
struct FinishGradWeights {
  const at::opmath_type<T>* dots;    // [N, parts]
  const T* grad;                     // [T, H]
  const T* b_out;                    // [E, H]; null: none
  at::opmath_type<T>* grad_weights;  // [T, K]
  int64_t hidden;
  int64_t intermediate;
};
template <typename T>
void finish_grad_weights(Stream stream,
                         const Plan& plan,
                         const TileMap& map,
                         const FinishGradWeights<T>& step);

}  // namespace torchmoe::cuda
