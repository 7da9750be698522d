// Products of rows sorted by expert with each expert's own matrix: the device's counterpart of
// cpu/gemm/grouped_product.h.
//
// Sums are formed in T's opmath type and rounded once, if Out is not that type.
#pragma once

#include <ATen/OpMathType.h>

#include "common/matrices.h"
#include "cuda/gemm/tile_map.h"

namespace torchmoe::cuda {

/// Rows that may be gathered: `sources` [N] gives for each row the row of `data` that it is taken from,
/// negative for none; null means that every row is in its place.
template <typename T>
struct SourceRows {
  const T* data;
  const int64_t* sources = nullptr;
};

/// Rows of a tile for products of T.
template <typename T>
int64_t product_tile_rows();

/// out[r] = rows[source of r] weight[e]^T + bias[e] for expert e's rows; rows of no expert are not
/// touched: rows [., in], weight [E, out, in] in either orientation, bias [E, out] or null, out [N, out].
template <typename T, typename Out>
void grouped_linear(Stream stream,
                    const TileMap& map,
                    const SourceRows<T>& rows,
                    const Matrices<const T>& weight,
                    const T* bias,
                    Out* out,
                    int64_t in_features,
                    int64_t out_features);

/// grad_rows[r] = grad[source of r] weight[e], the transposed product; rows of no expert are not
/// touched: grad [., out] -> grad_rows [N, in].
template <typename T, typename Out>
void grouped_linear_grad_rows(Stream stream,
                              const TileMap& map,
                              const SourceRows<T>& grad,
                              const Matrices<const T>& weight,
                              Out* grad_rows,
                              int64_t in_features,
                              int64_t out_features);

/// grad_weight[e] = sum over expert e's rows of grad[source]^T rows[source], 0 for an idle expert:
/// [E, out, in].
template <typename T>
void grouped_linear_grad_weight(Stream stream,
                                const TileMap& map,
                                const SourceRows<T>& grad,
                                const SourceRows<T>& rows,
                                const Matrices<T>& grad_weight,
                                int64_t in_features,
                                int64_t out_features);

/// grad_bias[e] = sum over expert e's rows of weights[r] * grad[source of r], null weights being 1:
/// [E, out].
template <typename T>
void grouped_linear_grad_bias(Stream stream,
                              const TileMap& map,
                              const SourceRows<T>& grad,
                              const at::opmath_type<T>* weights,
                              T* grad_bias,
                              int64_t out_features);

/// rows[r] = 0 for the rows that no expert owns.
template <typename T>
void zero_unrouted_rows(Stream stream, const TileMap& map, T* rows, int64_t width);

}  // namespace torchmoe::cuda
