// The softmax of a row of scores.
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/simd/instruction_sets.h"
#include "simd/catch2.h"
#include "simd/memory.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::cpu::Element;
using torchmoe::cpu::instruction_sets;
using torchmoe::cpu::Simd;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

/// Of the values as they are stored, out of place and in place.
Matrix softmax(const Simd& simd, const Stored& values) {
  const int64_t size = values.values().size();
  const auto* from = static_cast<const float*>(values.numbers().data);
  const Written<float> out(1, size, size), in_place(1, size, size);
  simd.softmax({size, from, out.data()});
  std::copy_n(from, size, in_place.data());
  simd.softmax({size, in_place.data(), in_place.data()});
  CHECK(out.values().equals(in_place.values()));
  CHECK(out.is_only_matrix_written());
  return out.values();
}

}  // namespace

TEST_CASE("softmax: values", "[cpu][softmax]") {
  for (const auto& [name, functions] : instruction_sets()) {
    for (const int64_t size : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 1000}) {
      for (const double scale : {1.0, 40.0, 3e38}) {
        for (const bool has_none : {false, true}) {
          INFO(name << " " << size << " up to " << scale << (has_none ? ", some -inf" : ""));
          Matrix given = wave_matrix(1, size, 0, scale);
          for (int64_t i = 1; has_none && i < size; i += 3) {
            given(0, i) = -kInf;
          }
          const Stored stored(given, Element::float32);
          const Matrix& values = stored.values();
          const Matrix probs = softmax(*functions, stored);
          double top = -kInf, total = 0;
          for (const double x : values.numbers()) {
            top = std::max(top, x);
          }
          for (const double x : values.numbers()) {
            total += std::exp(x - top);
          }
          for (int64_t i = 0; i < size; ++i) {
            const double x = values(0, i) - top, expected = std::exp(x) / total;
            // exp within 2 units in the last place, of a difference that is rounded; a sum of sums;
            // a division. What is smaller than float's normal numbers may be 0.
            const double relative = (6 + std::fabs(x) + 2 * std::log2(size + 1.0)) * kUnit +
                                    static_cast<double>(size) / 4 * kUnit;
            const double error = std::fabs(probs(0, i) - expected);
            CHECK(error <= (expected == 0 ? 0 : relative * expected) + 0x1p-125);
          }
        }
      }
    }
  }
}

TEST_CASE("softmax: what is not finite", "[cpu][softmax]") {
  for (const auto& [name, functions] : instruction_sets()) {
    for (const int64_t size : {1, 3, 16, 19, 40}) {
      INFO(name << " " << size);
      const Matrix none(1, size, -kInf), zeros(1, size);
      CHECK(softmax(*functions, Stored(none, Element::float32)).equals(zeros));
      for (const double odd : {kInf, static_cast<double>(NAN)}) {
        for (const int64_t place : {int64_t{0}, size / 2, size - 1}) {
          Matrix given = wave_matrix(1, size);
          given(0, place) = odd;
          const Matrix probs = softmax(*functions, Stored(given, Element::float32));
          // inf minus inf is NaN, and so is the sum that all are divided by.
          for (int64_t i = 0; i < size; ++i) {
            CHECK(std::isnan(probs(0, i)));
          }
        }
      }
    }
  }
}
