#include "ops/cache_insert.h"

#include <vector>

#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::cache_insert;
using torchmoe::CacheTable;
using torchmoe::CacheUse;

namespace {

Tensor numbers(const std::vector<int64_t>& values) {
  return torch::tensor(values, torch::kLong);
}

/// Rows of the identity, each of which is its own signature.
Tensor unit_rows(const Tensor& numbers) {
  return torch::eye(4).index_select(0, numbers);
}

}  // namespace

TEST_CASE("cache_insert: free entries first, then the one that gives way", "[cache_insert]") {
  const Tensor taken = numbers({0, 1, 0, 2, 1});
  const CacheTable table{torch::zeros({2, 4}), torch::full({2, 1}, -1, torch::kLong)};
  const CacheUse use{numbers({0, 0}), numbers({0, 0})};
  const auto insert = [&](std::string_view eviction) {
    return cache_insert(unit_rows(taken), taken.unsqueeze(1), table, use, 0.98, eviction);
  };
  const auto [row, last_used, uses] = insert("lru");
  CHECK(torch::equal(row, numbers({4, 3})));
  CHECK(torch::equal(last_used, numbers({4, 3})));
  CHECK(torch::equal(uses, numbers({1, 1})));
  const auto [kept, kept_last, kept_uses] = insert("lfu");
  CHECK(torch::equal(kept, numbers({0, 4})));
  CHECK(torch::equal(kept_last, numbers({2, 4})));
  CHECK(torch::equal(kept_uses, numbers({2, 1})));
}

TEST_CASE("cache_insert: a similar row uses its entry", "[cache_insert]") {
  const CacheTable table{unit_rows(numbers({3, 1})), numbers({3, 1}).unsqueeze(1)};
  const CacheUse use{numbers({7, 5}), numbers({2, 9})};
  const Tensor x = 1.01 * unit_rows(numbers({1, 3, 3}));
  const Tensor of_x = numbers({1, 3, -1}).unsqueeze(1);
  const auto [row, last_used, uses] = cache_insert(x, of_x, table, use, 0.98, "lru");
  CHECK(torch::equal(row, numbers({-1, -1})));
  CHECK(torch::equal(last_used, numbers({9, 8})));
  CHECK(torch::equal(uses, numbers({3, 10})));
}

TEST_CASE("cache_insert: errors", "[cache_insert]") {
  const Tensor x = torch::zeros({5, 4});
  const Tensor of_x = torch::zeros({5, 1}, torch::kLong);
  const CacheTable table{torch::zeros({2, 4}), torch::zeros({2, 1}, torch::kLong)};
  const CacheUse use{numbers({0, 0}), numbers({0, 0})};
  CHECK_THROWS_WITH(cache_insert(x, of_x, table, {numbers({0}), numbers({0, 0})}, 0.98, "lru"),
                    contains("cache_insert: last_used must be [num_entries] = [2], got shape [1]"));
  CHECK_THROWS_WITH(cache_insert(x, of_x, table, use, 0.98, "fifo"),
                    contains(R"(cache_insert: eviction must be one of "lru", "lfu", got "fifo")"));
  CHECK_THROWS_WITH(cache_insert(x, of_x, table, use, -1, "lru"),
                    contains("cache_insert: similarity must be in (0, 1], got -1"));
}
