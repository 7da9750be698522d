// How the instruction sets store float32 values in a narrower type.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/simd/instruction_sets.h"
#include "simd/catch2.h"
#include "simd/memory.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::cpu::instruction_sets;
using torchmoe::cpu::Simd;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

/// All 16-bit values, their midpoints to the next value and neighbours of these, and random bits.
template <typename T>
std::vector<float> numbers_to_round() {
  std::vector<float> numbers;
  const auto with_neighbours = [&](float x) {
    numbers.insert(numbers.end(), {x, std::nextafter(x, kInf), std::nextafter(x, -kInf)});
  };
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const double x = T::kFormat.value(bits), next = T::kFormat.value((bits + 1) & 0xffff);
    with_neighbours(static_cast<float>(x));
    with_neighbours(static_cast<float>((x + next) / 2));
  }
  constexpr float kLargest = std::numeric_limits<float>::max();
  for (const float x : {65504.0F, 65519.996F, 65520.0F, 65536.0F, kLargest, 3.3895314e38F, 0.0F}) {
    with_neighbours(x);
    with_neighbours(-x);
  }
  for (const uint32_t bits : {0x7f800001U, 0x7fffffffU, 0xffffffffU, 0xff800001U, 0x7fc00000U}) {
    numbers.push_back(std::bit_cast<float>(bits));  // NaN whose payload is lost when it is cut off
  }
  uint32_t state = 1;
  for (int i = 0; i < 200000; ++i) {
    state = state * 1664525 + 1013904223;
    numbers.push_back(std::bit_cast<float>(state));
  }
  return numbers;
}

template <typename T>
void check_rounding(const Simd& simd) {
  const auto numbers = numbers_to_round<T>();
  const auto count = static_cast<int64_t>(numbers.size());
  const Written<T> out(1, count, count);
  simd.store(numbers.data(), torchmoe::test::numbers(out.data()), count);
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T expected(numbers[i]), actual = out.data()[i];
    if (std::isnan(numbers[i]) ? !std::isnan(static_cast<double>(actual))
                               : actual.bits != expected.bits) {
      if (++wrong == 1) {
        UNSCOPED_INFO(std::hex << "bits " << std::bit_cast<uint32_t>(numbers[i]) << " become "
                               << actual.bits << " instead of " << expected.bits);
      }
    }
  }
  CHECK(wrong == 0);
}

template <typename T>
void check_counts(const Simd& simd) {
  for (int64_t count = 0; count <= 70; ++count) {
    INFO(count << " numbers");
    const Stored from(wave_matrix(1, count, 0, 100), torchmoe::cpu::Element::float32);
    const Written<T> out(1, count, count);
    simd.store(
        static_cast<const float*>(from.numbers().data), torchmoe::test::numbers(out.data()), count);
    CHECK(out.values().equals(from.values().as(element_of<T>())));
    CHECK(out.is_only_matrix_written());
  }
}

}  // namespace

TEST_CASE("store: rounds to nearest, ties to even", "[store]") {
  for (const auto& [name, functions] : instruction_sets()) {
    INFO(name);
    check_rounding<BFloat16>(*functions);
    check_rounding<Float16>(*functions);
    const auto numbers = numbers_to_round<Float16>();
    std::vector<float> out(numbers.size());
    functions->store(
        numbers.data(), torchmoe::test::numbers(out.data()), static_cast<int64_t>(out.size()));
    CHECK(std::memcmp(out.data(), numbers.data(), out.size() * sizeof(float)) == 0);
  }
}

TEST_CASE("store: writes what it is asked for", "[store]") {
  for (const auto& [name, functions] : instruction_sets()) {
    INFO(name);
    check_counts<float>(*functions);
    check_counts<BFloat16>(*functions);
    check_counts<Float16>(*functions);
  }
}
