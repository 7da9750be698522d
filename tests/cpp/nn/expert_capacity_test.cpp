// Capacities are exact: the factor is the nearest fraction of at most a million parts, and nothing is
// rounded after.
#include "nn/expert_capacity.h"

#include <limits>
#include <vector>

#include "catch2.h"

using torchmoe::CapacityFactor;
using torchmoe::expert_capacity;
using torchmoe::test::contains;

TEST_CASE("a capacity factor is the nearest fraction of at most a million parts", "[capacity]") {
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
      {4.0 / 3, 4, 3},
      {2.0 / 7, 2, 7},
      {3.141592653589793, 3126535, 995207},
      {0.9999994, 999999, 1000000},
      {0.9999995, 1, 1},
      {1e-6, 1, 1000000},
      {5e-7, 0, 1},
      {5.01e-7, 1, 1000000},
      {1e-300, 0, 1},
      {1e18, int64_t{1} << 31, 1},
      {1e300, int64_t{1} << 31, 1},
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
  CHECK(expert_capacity(10, 4, 1, 1.25, 0, "down") == 3);  // 3.125
  CHECK(expert_capacity(torch::tensor({10}, torch::kInt), 4, 1, 1.25).item<int64_t>() == 4);
}

TEST_CASE("capacity of a tensor of counts is that of each count", "[capacity]") {
  const auto most = int64_t{9'000'000'000};
  const auto counts = torch::cat({torch::arange(0, 300, torch::kLong),
                                  torch::tensor({most / 3, most / 2 + 1, most - 1, most})});
  for (const double factor :
       {0.0, 1e-18, 0.1, 0.9, 1.1, 1.25, 1.0 / 3, 4.0 / 3, 2.0 / 7, 5.0, 1e18}) {
    for (const int64_t num_experts : {1, 3, 8, 1000}) {
      for (int64_t top_k = 1; top_k <= std::min<int64_t>(num_experts, 3); ++top_k) {
        CAPTURE(factor, num_experts, top_k);
        for (const char* rounding : {"up", "down"}) {
          const auto capacity = expert_capacity(counts, num_experts, top_k, factor, 2, rounding);
          std::vector<int64_t> expected;
          for (int64_t i = 0; i < counts.size(0); ++i) {
            expected.push_back(expert_capacity(
                counts[i].item<int64_t>(), num_experts, top_k, factor, 2, rounding));
          }
          CHECK(torch::equal(capacity, torch::tensor(expected, torch::kLong)));
        }
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
  CHECK_THROWS_WITH(expert_capacity(4, 0, 1, 1.0),
                    contains("expert_capacity: num_experts must be in [1, 2147483648], got 0"));
  CHECK_THROWS_WITH(expert_capacity(4, 3, 4, 1.0),
                    contains("expert_capacity: top_k must be in [1, 3], got 4"));
  CHECK_THROWS_WITH(expert_capacity(-1, 3, 2, 1.0),
                    contains("expert_capacity: num_tokens must be >= 0, got -1"));
  CHECK_THROWS_WITH(expert_capacity(torch::tensor({3, -1}), 3, 2, 1.0),
                    contains("expert_capacity: num_tokens must be >= 0, got -1"));
  CHECK_THROWS_WITH(
      expert_capacity(4, 3, 2, 1.0, 0, "nearest"),
      contains("expert_capacity: rounding must be one of \"up\", \"down\", got \"nearest\""));
  CHECK_THROWS_WITH(expert_capacity(4, 3, 2, 1.0, -1),
                    contains("expert_capacity: min_capacity must be >= 0, got -1"));
  CHECK_THROWS_WITH(expert_capacity(torch::ones({2}), 3, 2, 1.0),
                    contains("expert_capacity: num_tokens must be an int or an int64 tensor, got"));
}
