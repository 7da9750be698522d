#include "ops/cache_signatures.h"

#include <cmath>

#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::cache_signatures;

TEST_CASE("cache_signatures: a bit for each plane", "[cache_signatures]") {
  for (const auto dtype : kFloatTypes) {
    INFO(dtype);
    const Tensor x = torch::tensor({{1., 2.}, {-1., 2.}, {0., 0.}, {3., 0.}}).to(dtype);
    const Tensor planes =
        torch::tensor({{{1., 0.}, {0., -1.}, {1., 1.}}, {{-1., 0.}, {0., 1.}, {0., -1.}}})
            .to(dtype);
    const Tensor expected = ids({{5, 2}, {4, 3}, {-1, -1}, {7, 6}});
    CHECK(torch::equal(cache_signatures(x, planes), expected));
    CHECK(torch::equal(cache_signatures(strided(x), strided(planes)), expected));
    const Tensor mask = torch::tensor({1, 0, 1, 1}, torch::kBool);
    const Tensor masked = ids({{5, 2}, {-1, -1}, {-1, -1}, {7, 6}});
    CHECK(torch::equal(cache_signatures(x, planes, mask), masked));
  }
}

TEST_CASE("cache_signatures: a row that is not a number", "[cache_signatures]") {
  const Tensor x = torch::tensor({{std::nan(""), 1.}, {1e-80, 0.}});
  CHECK(torch::equal(cache_signatures(x, torch::ones({1, 1, 2})), ids({{-1}, {-1}})));
}

TEST_CASE("cache_signatures: errors", "[cache_signatures]") {
  const Tensor x = torch::zeros({5, 4});
  const Tensor planes = torch::zeros({2, 3, 4});
  CHECK_THROWS_WITH(cache_signatures(x[0], planes),
                    contains("cache_signatures: x must be [") && contains("got shape [4]"));
  CHECK_THROWS_WITH(cache_signatures(x, torch::zeros({2, 3, 5})),
                    contains("cache_signatures: planes must be [") && contains("got shape"));
  CHECK_THROWS_WITH(cache_signatures(x, torch::zeros({1, 63, 4})),
                    contains("cache_signatures: planes must have 1 to 62 bits"));
  CHECK_THROWS_WITH(cache_signatures(x, planes, torch::ones({5})),
                    contains("cache_signatures: row_mask must be Bool, got Float"));
}
