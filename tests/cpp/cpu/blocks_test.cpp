#include "cpu/gemm/blocks.h"

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>

#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::cpu::Block;
using torchmoe::cpu::kFewestColumns;
using torchmoe::cpu::matrix_blocks;
using torchmoe::cpu::Offsets;
using torchmoe::cpu::read_offsets;
using torchmoe::cpu::row_blocks;

namespace {

// What a task's result may hold: see blocks.cpp.
constexpr int64_t kMostRows = 512, kMostColumns = 256, kMostMatrixColumns = 512;

/// Empty when every number of every expert's rows and columns is in one block, else what is wrong.
/// `first` is each expert's first row, `rows` how many it has.
std::string cover(const std::vector<Block>& blocks,
                  const std::vector<int64_t>& first,
                  const std::vector<int64_t>& rows,
                  int64_t columns,
                  int64_t most_columns) {
  std::vector<Tensor> counts;
  for (const int64_t count : rows) {
    counts.push_back(torch::zeros({count, columns}, torch::kByte));
  }
  for (const auto& block : blocks) {
    const auto text = [&](const std::string& what) {
      return c10::str(what,
                      ": expert ",
                      block.expert,
                      " rows ",
                      block.rows.begin,
                      " to ",
                      block.rows.end,
                      " columns ",
                      block.columns.begin,
                      " to ",
                      block.columns.end);
    };
    if (block.expert < 0 || block.expert >= static_cast<int64_t>(rows.size())) {
      return text("no such expert");
    }
    const int64_t begin = block.rows.begin - first[block.expert];
    const int64_t end = block.rows.end - first[block.expert];
    if (begin < 0 || end > rows[block.expert] || block.columns.begin < 0 ||
        block.columns.end > columns) {
      return text("outside");
    }
    if (block.rows.size() < 1 || block.columns.size() < 1) {
      return text("nothing in it");
    }
    if (block.rows.size() > kMostRows || block.columns.size() > most_columns) {
      return text("too large");
    }
    if (block.columns.begin % kFewestColumns != 0) {
      return text("begins between two stretches of columns");
    }
    counts[block.expert]
        .slice(0, begin, end)
        .slice(1, block.columns.begin, block.columns.end)
        .add_(1);
  }
  for (size_t e = 0; e < rows.size(); ++e) {
    if (!counts[e].eq(1).all().item<bool>()) {
      return c10::str("not once each: expert ", e);
    }
  }
  return "";
}

std::string cover_rows(const Offsets& offsets, int64_t columns, int64_t beside) {
  const std::vector<int64_t> first(offsets.begin(), offsets.end() - 1);
  std::vector<int64_t> rows;
  for (size_t e = 0; e < first.size(); ++e) {
    rows.push_back(offsets[e + 1] - offsets[e]);
  }
  return cover(row_blocks(offsets, columns, beside), first, rows, columns, kMostColumns);
}

std::string cover_matrices(int64_t experts, int64_t rows, int64_t columns, int64_t beside) {
  return cover(matrix_blocks(experts, rows, columns, beside),
               std::vector<int64_t>(experts, 0),
               std::vector<int64_t>(experts, rows),
               columns,
               kMostMatrixColumns);
}

const std::vector<int64_t> kSizes = {
    0, 1, 15, 16, 17, 63, 64, 65, 127, 129, 255, 256, 257, 511, 512, 513, 700, 1025};

}  // namespace

TEST_CASE("blocks: every number once", "[cpu][blocks]") {
  for (const int64_t rows : kSizes) {
    for (const int64_t columns : kSizes) {
      for (const int64_t beside : {1, 3}) {
        INFO(rows << " rows, " << columns << " columns, beside " << beside);
        CHECK(cover_rows({0, rows}, columns, beside) == "");
        CHECK(cover_matrices(1, rows, columns, beside) == "");
      }
    }
  }
}

TEST_CASE("blocks: every number of many experts once", "[cpu][blocks]") {
  std::mt19937_64 random(1);
  const auto below = [&](int64_t end) { return static_cast<int64_t>(random() % end); };
  for (int repeat = 0; repeat < 200; ++repeat) {
    const int64_t experts = below(12), columns = below(700), beside = 1 + below(8);
    Offsets offsets = {below(50)};
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t most[] = {1, 3, 100, 1200};
      offsets.push_back(offsets.back() + below(most[below(4)]));
    }
    INFO("repeat " << repeat << ": " << experts << " experts, " << columns << " columns");
    CHECK(cover_rows(offsets, columns, beside) == "");
    CHECK(cover_matrices(experts, below(600), columns, beside) == "");
  }
}

TEST_CASE("blocks: no experts", "[cpu][blocks]") {
  CHECK(row_blocks({}, 5).empty());
  CHECK(row_blocks({0}, 5).empty());
  CHECK(matrix_blocks(0, 5, 5).empty());
}

TEST_CASE("blocks: few experts are cut finer, by sizes alone", "[cpu][blocks]") {
  CHECK(row_blocks({0, 100}, 1024).size() == 16);
  CHECK(row_blocks({0, 100}, 1024, /*beside=*/4).size() == 4);
  CHECK(row_blocks({0, 100, 200, 300, 400}, 1024).size() == 16);
  const int threads = at::get_num_threads();
  const auto sizes = [] {
    return std::pair{row_blocks({0, 700, 900}, 300).size(), matrix_blocks(2, 700, 300).size()};
  };
  at::set_num_threads(1);
  const auto expected = sizes();
  at::set_num_threads(4);
  CHECK(sizes() == expected);
  at::set_num_threads(threads);
}

TEST_CASE("read_offsets: ascending and within the rows, whatever is given", "[cpu][blocks]") {
  constexpr int64_t kFar = std::numeric_limits<int64_t>::max();
  const auto read = [](const std::vector<int64_t>& values) {
    return read_offsets(torch::tensor(values, torch::kLong), 10);
  };
  CHECK(read({0, 3, 3, 10}) == Offsets{0, 3, 3, 10});
  CHECK(read({-5, 3, 2, 7}) == Offsets{0, 3, 3, 7});
  CHECK(read({0, 50, 3, -kFar}) == Offsets{0, 10, 10, 10});
  CHECK(read({kFar, -kFar - 1}) == Offsets{10, 10});
  CHECK(read({2, 5}) == Offsets{2, 5});
  CHECK(read({}).empty());
  const Tensor strided = torch::tensor({{0, 7}, {4, 7}, {9, 7}}, torch::kLong).select(1, 0);
  CHECK(read_offsets(strided, 10) == Offsets{0, 4, 9});
}
