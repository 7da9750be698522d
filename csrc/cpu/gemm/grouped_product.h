// Products of rows sorted by expert with each expert's own matrix.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace torchmoe::cpu {

/// Rows in expert order: expert e's are offsets[e] .. offsets[e + 1].
using Offsets = std::vector<int64_t>;

/// expert_offsets as the kernels use it: ascending and within [0, num_rows], whatever the tensor
/// holds, so that a bad plan gives a defined result and never a wild access.
Offsets read_offsets(const at::Tensor& expert_offsets, int64_t num_rows);

/// out[r] = rows[r] weight[e]^T + bias[e] for expert e's rows; rows past offsets.back() are not
/// touched. rows [N, in], weight [E, out, in], bias [E, out] or null, out [N, out]; T is float or
/// double.
template <typename T>
void grouped_linear(const Offsets& offsets,
                    const T* rows,
                    const T* weight,
                    const T* bias,
                    T* out,
                    int64_t in_features,
                    int64_t out_features);

/// grad_rows[r] = grad[r] weight[e], the transposed product: grad [N, out] -> grad_rows [N, in].
template <typename T>
void grouped_linear_grad_rows(const Offsets& offsets,
                              const T* grad,
                              const T* weight,
                              T* grad_rows,
                              int64_t in_features,
                              int64_t out_features);

/// grad_weight[e] = sum over expert e's rows of grad[r]^T rows[r], 0 for an idle expert: [E, out,
/// in].
template <typename T>
void grouped_linear_grad_weight(const Offsets& offsets,
                                const T* grad,
                                const T* rows,
                                T* grad_weight,
                                int64_t in_features,
                                int64_t out_features);

/// grad_bias[e] = sum over expert e's rows of grad[r], in row order: [E, out].
template <typename T>
void grouped_linear_grad_bias(const Offsets& offsets,
                              const T* grad,
                              T* grad_bias,
                              int64_t out_features);

}  // namespace torchmoe::cpu
