#include "cpu/gemm/blocks.h"

#include <algorithm>

namespace torchmoe::cpu {

namespace {

// A task packs its operands once for its block of the result: the larger the block, the less often.
// With twice as many, the layer is 5 to 10 % slower. 512 x 256 float32 are 512 KB, which stay in L2
// until the activation has read them.
constexpr int64_t kMostRows = 512;
constexpr int64_t kMostColumns = 256;
// Nobody reads a gradient's block again.
constexpr int64_t kMostMatrixColumns = 512;
// Where there are fewer blocks than this, threads would be idle; they become narrower.
constexpr int64_t kEnoughBlocks = 16;

/// [0, size) in equal ranges of at most `most`, multiples of `unit`.
std::vector<Range> split(int64_t size, int64_t most, int64_t unit) {
  const int64_t count = (size + most - 1) / most;
  std::vector<Range> ranges;
  if (count == 0) {
    return ranges;
  }
  const int64_t width = ((size + count - 1) / count + unit - 1) / unit * unit;
  for (int64_t begin = 0; begin < size; begin += width) {
    ranges.push_back({begin, std::min(begin + width, size)});
  }
  return ranges;
}

struct ExpertRange {
  int64_t expert;
  Range rows;
};

/// Every range of rows with all ranges of columns, which are cut finer where there are few blocks.
std::vector<Block> with_columns(const std::vector<ExpertRange>& ranges,
                                int64_t columns,
                                int64_t most,
                                int64_t beside) {
  const auto num_ranges = static_cast<int64_t>(ranges.size()) * beside;
  while (most > kFewestColumns && num_ranges * ((columns + most - 1) / most) < kEnoughBlocks) {
    most /= 2;
  }
  const auto column_ranges = split(columns, most, kFewestColumns);
  std::vector<Block> blocks;
  blocks.reserve(ranges.size() * column_ranges.size());
  for (const auto& [expert, rows] : ranges) {
    for (const auto& column_range : column_ranges) {
      blocks.push_back({expert, rows, column_range});
    }
  }
  return blocks;
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

std::vector<Block> row_blocks(const Offsets& offsets, int64_t columns, int64_t beside) {
  std::vector<ExpertRange> ranges;
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    for (const auto& range : split(offsets[e + 1] - offsets[e], kMostRows, /*unit=*/1)) {
      ranges.push_back(
          {static_cast<int64_t>(e), {offsets[e] + range.begin, offsets[e] + range.end}});
    }
  }
  return with_columns(ranges, columns, kMostColumns, beside);
}

std::vector<Block> matrix_blocks(int64_t num_experts,
                                 int64_t rows,
                                 int64_t columns,
                                 int64_t beside) {
  const auto row_ranges = split(rows, kMostRows, /*unit=*/1);
  std::vector<ExpertRange> ranges;
  for (int64_t e = 0; e < num_experts; ++e) {
    for (const auto& range : row_ranges) {
      ranges.push_back({e, range});
    }
  }
  return with_columns(ranges, columns, kMostMatrixColumns, beside);
}

}  // namespace torchmoe::cpu
