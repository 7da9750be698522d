// Sums of rows that lie anywhere in memory.
#include <cmath>
#include <vector>

#include "cpu/simd/instruction_sets.h"
#include "simd/catch2.h"
#include "simd/memory.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::cpu::Element;
using torchmoe::cpu::instruction_sets;
using torchmoe::cpu::Simd;

namespace {

template <typename T>
void check_sum(const Simd& simd, int64_t count, int64_t width) {
  const Matrix values = wave_matrix(count + 1, width), weights = wave_matrix(1, count + 1, 2);
  const Stored given(weights.last(1, count), Element::float32);
  std::vector<Stored> stored;  // each ends where nothing may be read
  std::vector<const float*> rows;
  for (int64_t i = 0; i <= count; ++i) {
    Matrix row(1, width);
    std::copy_n(values.row(i), width, row.row(0));
    stored.emplace_back(row, Element::float32);
    rows.push_back(static_cast<const float*>(stored.back().numbers().data));
  }
  const Written<T> out(1, width, width);
  simd.weighted_sum({count,
                     rows.data() + 1,
                     static_cast<const float*>(given.numbers().data),
                     width,
                     numbers(out.data()),
                     /*num_next=*/1,
                     rows.data()});
  constexpr double kStored = std::is_same_v<T, float> ? 0 : RoundingOf<T>::kUnit;
  for (int64_t c = 0; c < width; ++c) {
    double sum = 0, size = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double term = given.values()(0, i) * stored[i + 1].values()(0, c);
      sum += term;
      size += std::fabs(term);
    }
    const double allowed =
        static_cast<double>(count) * kUnit * size * (1 + kStored) + kStored * std::fabs(sum);
    CHECK(std::fabs(static_cast<double>(out.at(0, c)) - sum) <= allowed);
  }
  CHECK(out.is_only_matrix_written());
}

}  // namespace

TEST_CASE("weighted_sum: values", "[cpu][weighted_sum]") {
  for (const auto& [name, functions] : instruction_sets()) {
    for (const int64_t count : {0, 1, 2, 8}) {
      for (const int64_t width : {1, 3, 4, 7, 8, 15, 16, 17, 33, 130}) {
        INFO(name << " " << count << " rows of " << width);
        check_sum<float>(*functions, count, width);
        check_sum<BFloat16>(*functions, count, width);
        check_sum<Float16>(*functions, count, width);
      }
    }
  }
}

TEST_CASE("weighted_sum: the rows are added in order", "[cpu][weighted_sum]") {
  const float rows[3][1] = {{0x1p30F}, {-0x1p30F}, {1}};
  const float weights[3] = {1, 1, 1};
  for (const auto& [name, functions] : instruction_sets()) {
    INFO(name);
    for (const auto& [order, expected] :
         std::vector<std::pair<std::vector<int>, float>>{{{0, 1, 2}, 1}, {{0, 2, 1}, 0}}) {
      std::vector<const float*> given;
      for (const int i : order) {
        given.push_back(rows[i]);
      }
      float out = -1;
      functions->weighted_sum({3, given.data(), weights, 1, numbers(&out), 0, nullptr});
      CHECK(out == expected);
    }
  }
}
