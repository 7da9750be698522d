#include "cpu/gemm/grouped_product.h"

#include <algorithm>

#include "cpu/gemm/product.h"
#include "cpu/parallel.h"

namespace torchmoe::cpu {

namespace {

// A task is one expert's block of this many rows (of the result). 128 rows amortise the library's
// packing of the expert's matrix and still give each of two threads several tasks on the toy sizes
// people train on a laptop.
constexpr int64_t kBlockRows = 128;

struct Block {
  int64_t expert;
  int64_t begin;
  int64_t end;
};

/// Cuts every expert's range [0, rows_of(e)) into blocks.
template <typename RowsOf>
std::vector<Block> blocks(int64_t num_experts, const RowsOf& rows_of) {
  std::vector<Block> result;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t rows = rows_of(e);
    for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
      result.push_back({e, begin, std::min(begin + kBlockRows, rows)});
    }
  }
  return result;
}

/// Blocks of the rows that the experts own, numbered over all rows.
std::vector<Block> row_blocks(const Offsets& offsets) {
  const auto num_experts = static_cast<int64_t>(offsets.size()) - 1;
  auto result = blocks(num_experts, [&](int64_t e) { return offsets[e + 1] - offsets[e]; });
  for (auto& block : result) {
    block.begin += offsets[block.expert];
    block.end += offsets[block.expert];
  }
  return result;
}

}  // namespace

Offsets read_offsets(const at::Tensor& expert_offsets, int64_t num_rows) {
  const auto given = expert_offsets.contiguous();
  const auto* data = given.const_data_ptr<int64_t>();
  Offsets offsets(given.numel());
  int64_t previous = 0;
  for (int64_t e = 0; e < given.numel(); ++e) {
    previous = std::clamp(data[e], previous, num_rows);
    offsets[e] = previous;
  }
  return offsets;
}

template <typename T>
void grouped_linear(const Offsets& offsets,
                    const T* rows,
                    const T* weight,
                    const T* bias,
                    T* out,
                    int64_t in_features,
                    int64_t out_features) {
  const auto tasks = row_blocks(offsets);
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const auto [expert, begin, end] = tasks[i];
    const Matrix<const T> w{
        weight + expert * out_features * in_features, out_features, in_features, in_features};
    const Matrix<const T> a{rows + begin * in_features, end - begin, in_features, in_features};
    product(
        a, w.transposed(), {out + begin * out_features, end - begin, out_features, out_features});
    if (bias != nullptr) {
      const T* b = bias + expert * out_features;
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t o = 0; o < out_features; ++o) {
          out[r * out_features + o] += b[o];
        }
      }
    }
  });
}

template <typename T>
void grouped_linear_grad_rows(const Offsets& offsets,
                              const T* grad,
                              const T* weight,
                              T* grad_rows,
                              int64_t in_features,
                              int64_t out_features) {
  const auto tasks = row_blocks(offsets);
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const auto [expert, begin, end] = tasks[i];
    const Matrix<const T> w{
        weight + expert * out_features * in_features, out_features, in_features, in_features};
    const Matrix<const T> g{grad + begin * out_features, end - begin, out_features, out_features};
    product(g, w, {grad_rows + begin * in_features, end - begin, in_features, in_features});
  });
}

template <typename T>
void grouped_linear_grad_weight(const Offsets& offsets,
                                const T* grad,
                                const T* rows,
                                T* grad_weight,
                                int64_t in_features,
                                int64_t out_features) {
  const auto num_experts = static_cast<int64_t>(offsets.size()) - 1;
  const auto tasks = blocks(num_experts, [&](int64_t /*e*/) { return out_features; });
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const auto [expert, begin, end] = tasks[i];
    const int64_t first = offsets[expert];
    const int64_t count = offsets[expert + 1] - first;
    T* out = grad_weight + (expert * out_features + begin) * in_features;
    if (count == 0) {
      std::fill(out, out + (end - begin) * in_features, T(0));
      return;
    }
    const Matrix<const T> g{grad + first * out_features, count, out_features, out_features};
    const Matrix<const T> a{rows + first * in_features, count, in_features, in_features};
    product(g.col_range(begin, end).transposed(), a, {out, end - begin, in_features, in_features});
  });
}

template <typename T>
void grouped_linear_grad_bias(const Offsets& offsets,
                              const T* grad,
                              T* grad_bias,
                              int64_t out_features) {
  const auto num_experts = static_cast<int64_t>(offsets.size()) - 1;
  parallel_tasks(num_experts, [&](int64_t e) {
    T* sum = grad_bias + e * out_features;
    std::fill(sum, sum + out_features, T(0));
    for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
      for (int64_t o = 0; o < out_features; ++o) {
        sum[o] += grad[r * out_features + o];
      }
    }
  });
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_INSTANTIATE(T)                                            \
  template void grouped_linear(                                            \
      const Offsets&, const T*, const T*, const T*, T*, int64_t, int64_t); \
  template void grouped_linear_grad_rows(                                  \
      const Offsets&, const T*, const T*, T*, int64_t, int64_t);           \
  template void grouped_linear_grad_weight(                                \
      const Offsets&, const T*, const T*, T*, int64_t, int64_t);           \
  template void grouped_linear_grad_bias(const Offsets&, const T*, T*, int64_t);
TORCHMOE_INSTANTIATE(float)
TORCHMOE_INSTANTIATE(double)
#undef TORCHMOE_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace torchmoe::cpu
