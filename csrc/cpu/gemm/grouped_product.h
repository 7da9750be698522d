// Products of rows sorted by expert with each expert's own matrix, as tasks.
//
// weight is [E, out, in] in either orientation, bias [E, out] or null. Rows past offsets.back() are neither read nor
// written. `beside` is as in blocks.h. Out is the type of the result; sums are formed in float32, or
// float64 for float64.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/elements.h"
#include "cpu/gemm/blocks.h"
#include "cpu/gemm/matrices.h"
#include "cpu/gemm/product.h"
#include "cpu/gemm/tasks.h"

namespace torchmoe::cpu {

/// Every expert's matrix and bias; null: none.
template <typename W>
struct Linear {
  Matrices<const W> weight;
  const W* bias;
};

/// out[r] = rows[r] weight[e]^T + bias[e] for expert e's rows: rows [N, in] -> out [N, out].
template <typename A, typename W, typename Out>
void grouped_linear(Phase& tasks,
                    const Offsets& offsets,
                    const Rows<A>& rows,
                    const Linear<W>& linear,
                    Out* out,
                    int64_t in_features,
                    int64_t out_features,
                    int64_t beside = 1) {
  for (const auto& block : row_blocks(offsets, out_features, beside)) {
    const ProductSizes sizes{block.rows.size(), block.columns.size(), in_features};
    tasks.push_back([=](Workspace& workspace) {
      const int64_t first = block.columns.begin;
      times_transposed(
          rows.from(block.rows.begin, 0),
          linear.weight.of(block.expert).from(first, 0),
          sizes,
          linear.bias == nullptr ? nullptr : linear.bias + block.expert * out_features + first,
          out + block.rows.begin * out_features + first,
          out_features,
          workspace);
    });
  }
}

/// grad_rows[r] = grad[r] weight[e], the transposed product: grad [N, out] -> grad_rows [N, in].
template <typename G, typename W, typename Out>
void grouped_linear_grad_rows(Phase& tasks,
                              const Offsets& offsets,
                              const Rows<G>& grad,
                              const Matrices<const W>& weight,
                              Out* grad_rows,
                              int64_t in_features,
                              int64_t out_features,
                              int64_t beside = 1) {
  for (const auto& block : row_blocks(offsets, in_features, beside)) {
    const ProductSizes sizes{block.rows.size(), block.columns.size(), out_features};
    tasks.push_back([=](Workspace& workspace) {
      times(grad.from(block.rows.begin, 0),
            weight.of(block.expert).from(0, block.columns.begin),
            sizes,
            grad_rows + block.rows.begin * in_features + block.columns.begin,
            in_features,
            workspace);
    });
  }
}

/// grad_weight[e] = sum over expert e's rows of grad[r]^T rows[r], 0 for an idle expert: [E, out,
/// in]. In either orientation the rows in memory are those of a product.
template <typename T, typename Out>
void grouped_linear_grad_weight(Phase& tasks,
                                const Offsets& offsets,
                                const Rows<T>& grad,
                                const Rows<T>& rows,
                                const Matrices<Out>& grad_weight,
                                int64_t in_features,
                                int64_t out_features,
                                int64_t beside = 1) {
  if (grad_weight.transposed) {
    return grouped_linear_grad_weight(
        tasks, offsets, rows, grad, grad_weight.transpose(), out_features, in_features, beside);
  }
  const auto num_experts = static_cast<int64_t>(offsets.size()) - 1;
  for (const auto& block : matrix_blocks(num_experts, out_features, in_features, beside)) {
    const int64_t first = offsets[block.expert];
    const ProductSizes sizes{
        block.rows.size(), block.columns.size(), offsets[block.expert + 1] - first};
    tasks.push_back([=](Workspace& workspace) {
      const auto to = grad_weight.of(block.expert).from(block.rows.begin, block.columns.begin);
      product(Form::tn,
              grad.from(first, block.rows.begin),
              rows.from(first, block.columns.begin),
              sizes,
              /*bias=*/nullptr,
              to.data,
              to.stride,
              workspace);
    });
  }
}

/// grad_bias[e] = sum over expert e's rows of weights[r] * grad[r], in row order: [E, out]. Null
/// weights count as 1.
template <typename G, typename Acc, typename Out>
void grouped_linear_grad_bias(Phase& tasks,
                              const Offsets& offsets,
                              const Rows<G>& grad,
                              const Acc* weights,
                              Out* grad_bias,
                              int64_t out_features) {
  const auto num_experts = static_cast<int64_t>(offsets.size()) - 1;
  for (const auto& block : matrix_blocks(num_experts, 1, out_features)) {
    const Range rows{offsets[block.expert], offsets[block.expert + 1]};
    tasks.push_back([=](Workspace& workspace) {
      Acc* sum = workspace.sums.get<Acc>(block.columns.size());
      std::fill_n(sum, block.columns.size(), Acc(0));
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const G* row = grad.from(0, block.columns.begin).row(r);
        const Acc weight = weights == nullptr ? Acc(1) : weights[r];
        for (int64_t o = 0; row != nullptr && o < block.columns.size(); ++o) {
          sum[o] += weight * static_cast<Acc>(row[o]);
        }
      }
      Out* out = grad_bias + block.expert * out_features + block.columns.begin;
      if constexpr (std::is_same_v<Acc, float>) {
        simd().store(sum, numbers(out), block.columns.size());
      } else {
        std::copy_n(sum, block.columns.size(), out);
      }
    });
  }
}

}  // namespace torchmoe::cpu
