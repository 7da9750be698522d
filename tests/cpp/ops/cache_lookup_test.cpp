#include "ops/cache_lookup.h"

#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::cache_lookup;
using torchmoe::CacheTable;

namespace {

CacheTable table_of(const Tensor& keys, const Tensor& signatures) {
  return {keys, signatures};
}

Tensor order_of(const Tensor& signatures) {
  return std::get<1>(signatures.t().sort(/*stable=*/true));
}

}  // namespace

TEST_CASE("cache_lookup: the nearest similar key that shares a signature", "[cache_lookup]") {
  for (const auto dtype : kFloatTypes) {
    INFO(dtype);
    const auto wide = dtype == torch::kDouble ? torch::kDouble : torch::kFloat;
    const Tensor keys =
        torch::tensor({{4., 0.}, {4., 0.25}, {4., 0.25}, {0., 4.}, {4., 0.}}).to(wide);
    const Tensor of_keys = ids({{1, 0}, {1, 2}, {1, 2}, {3, 3}, {-1, -1}});
    const Tensor x =
        torch::tensor({{4., 0.}, {4., 0.25}, {4., 0.25}, {4., 4.}, {8., 0.}, {0., 4.}}).to(dtype);
    const Tensor of_x = ids({{1, 5}, {5, 2}, {7, 7}, {1, 2}, {1, 0}, {-1, -1}});
    const Tensor expected = torch::tensor({0, 1, -1, -1, -1, -1}, torch::kLong);
    const auto found = cache_lookup(x, of_x, table_of(keys, of_keys), order_of(of_keys), 0.875);
    CHECK(torch::equal(found, expected));
    CHECK(torch::equal(cache_lookup(strided(x),
                                    strided(of_x),
                                    table_of(strided(keys), strided(of_keys)),
                                    strided(order_of(of_keys)),
                                    0.875),
                       expected));
  }
}

TEST_CASE("cache_lookup: errors", "[cache_lookup]") {
  const Tensor x = torch::zeros({5, 4});
  const Tensor of_x = torch::zeros({5, 2}, torch::kLong);
  const Tensor of_keys = torch::zeros({3, 2}, torch::kLong);
  const auto table = table_of(torch::zeros({3, 4}), of_keys);
  const Tensor order = order_of(of_keys);
  CHECK_THROWS_WITH(cache_lookup(x, of_x[0], table, order, 0.5),
                    contains("cache_lookup: signatures must be [") && contains("got shape [2]"));
  CHECK_THROWS_WITH(
      cache_lookup(x, of_x, table_of(torch::zeros({3, 4}, torch::kDouble), of_keys), order, 0.5),
      contains("cache_lookup: keys must be Float, got Double"));
  CHECK_THROWS_WITH(cache_lookup(x, of_x, table, of_keys, 0.5),
                    contains("cache_lookup: order must be [") && contains("got shape [3, 2]"));
  CHECK_THROWS_AS(cache_lookup(x, of_x, table, order, 0.), c10::ValueError);
  CHECK_THROWS_WITH(cache_lookup(x, of_x, table, order, 1.5),
                    contains("cache_lookup: similarity must be in (0, 1], got 1.5"));
}
