// Capacities are exact: the factor is the decimal that was written, and nothing is rounded after.
#include "nn/capacity.h"

#include <limits>
#include <vector>

#include "catch2.h"

using torchmoe::CapacityFactor;
using torchmoe::expert_capacity;
using torchmoe::test::contains;

TEST_CASE("a capacity factor is the decimal that was written", "[capacity]") {
  struct Case {
    double factor;
    int64_t numerator;
    int64_t denominator;
  };
  const std::vector<Case> cases = {
      {1.1, 11, 10},
      {1.25, 5, 4},
      {0.0, 0, 1},
      {-0.0, 0, 1},
      {2, 2, 1},
      {100, 100, 1},
      {123.456, 15432, 125},
      {0.1, 1, 10},
      {4.0 / 3, 13333333333333333, 10000000000000000},
      {1e18, 1000000000000000000, 1},
      {1e-18, 1, 1000000000000000000},
      {5e-19, 1, 2000000000000000000},
  };
  for (const auto& [factor, numerator, denominator] : cases) {
    CAPTURE(factor);
    CHECK(CapacityFactor(factor).numerator() == numerator);
    CHECK(CapacityFactor(factor).denominator() == denominator);
  }
}

TEST_CASE("capacity: numbers to check against", "[capacity]") {
  const auto of_fixture = [](double factor) { return expert_capacity(12, 4, 2, factor); };
  CHECK(of_fixture(0.5) == 3);
  CHECK(of_fixture(0.9) == 6);
  CHECK(of_fixture(1.0) == 6);
  CHECK(of_fixture(1.1) == 7);
  CHECK(of_fixture(1.25) == 8);
  CHECK(expert_capacity(200, 4, 2, 1.1) == 110);  // a float product gives 111
  CHECK(expert_capacity(0, 4, 2, 1.1, 7) == 0);
  CHECK(expert_capacity(100, 4, 2, 0.0) == 0);
  CHECK(expert_capacity(100, 4, 2, 0.0, 3) == 3);
  CHECK(expert_capacity(2, 4, 2, 1.0, 5) == 2);
  CHECK(expert_capacity(10, 4, 2, 1e18) == 10);
  CHECK(expert_capacity(int64_t{1} << 60, 2, 2, 0.5) == int64_t{1} << 59);
}

TEST_CASE("capacity of a tensor of counts is that of each count", "[capacity]") {
  const auto most = int64_t{1} << 31;
  const auto counts = torch::cat({torch::arange(0, 300, torch::kLong),
                                  torch::tensor({most / 3, most / 2 + 1, most - 1, most})});
  for (const double factor :
       {0.0, 1e-18, 0.1, 0.9, 1.1, 1.25, 1.0 / 3, 4.0 / 3, 2.0 / 7, 5.0, 1e18}) {
    for (const int64_t num_experts : {1, 3, 8, 1000}) {
      for (int64_t top_k = 1; top_k <= std::min<int64_t>(num_experts, 3); ++top_k) {
        CAPTURE(factor, num_experts, top_k);
        const auto capacity = expert_capacity(counts, num_experts, top_k, factor, 2);
        std::vector<int64_t> expected;
        for (int64_t i = 0; i < counts.size(0); ++i) {
          expected.push_back(
              expert_capacity(counts[i].item<int64_t>(), num_experts, top_k, factor, 2));
        }
        CHECK(torch::equal(capacity, torch::tensor(expected, torch::kLong)));
      }
    }
  }
}

TEST_CASE("capacity refuses what has no meaning", "[capacity]") {
  const auto infinity = std::numeric_limits<double>::infinity();
  CHECK_THROWS_WITH(
      CapacityFactor(-0.5),
      contains("expert_capacity: capacity_factor must be a finite number >= 0, got -0.5"));
  CHECK_THROWS_WITH(CapacityFactor(infinity, "Capacity", "factor"),
                    contains("Capacity: factor must be a finite number >= 0, got inf"));
  CHECK_THROWS_WITH(
      CapacityFactor(std::numeric_limits<double>::quiet_NaN()),
      contains("expert_capacity: capacity_factor must be a finite number >= 0, got nan"));
  CHECK_THROWS_WITH(CapacityFactor(1e300), contains("must be a fraction of two 64-bit integers"));
  CHECK_THROWS_WITH(CapacityFactor(1e-300), contains("must be a fraction of two 64-bit integers"));
  CHECK_THROWS_WITH(expert_capacity(4, 0, 1, 1.0),
                    contains("expert_capacity: num_experts must be in [1, 2^31], got 0"));
  CHECK_THROWS_WITH(expert_capacity(4, 3, 4, 1.0),
                    contains("expert_capacity: top_k must be in [1, 3], got 4"));
  CHECK_THROWS_WITH(expert_capacity(-1, 3, 2, 1.0),
                    contains("expert_capacity: num_tokens must be >= 0, got -1"));
  CHECK_THROWS_WITH(expert_capacity(std::numeric_limits<int64_t>::max(), 3, 2, 1.0),
                    contains("expert_capacity: num_tokens must be below 2^63 / top_k"));
  CHECK_THROWS_WITH(expert_capacity(4, 3, 2, 1.0, -1),
                    contains("expert_capacity: min_capacity must be >= 0, got -1"));
  CHECK_THROWS_WITH(expert_capacity(torch::ones({2}), 3, 2, 1.0),
                    contains("expert_capacity: num_tokens must be an int64 tensor, got"));
}
