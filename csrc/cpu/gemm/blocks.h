// How the products of one layer are cut into tasks. No number of a result depends on it: a sum belongs to
// one task, and sums over columns are formed in stretches of kFewestColumns.
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

/// Part of a range.
struct Range {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

/// One expert's rows and columns of a result.
struct Block {
  int64_t expert;
  Range rows;
  Range columns;
};

/// Every range of columns begins at a multiple of this.
constexpr int64_t kFewestColumns = 64;

/// Cuts every expert's rows and all columns into blocks. `beside` such problems run at the same
/// time and share the threads.
std::vector<Block> row_blocks(const Offsets& offsets, int64_t columns, int64_t beside = 1);

/// Cuts every expert's [rows, columns] matrix into blocks.
std::vector<Block> matrix_blocks(int64_t num_experts,
                                 int64_t rows,
                                 int64_t columns,
                                 int64_t beside = 1);

}  // namespace torchmoe::cpu
