#include "ops/limit_capacity.h"

#include <cmath>
#include <limits>

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::limit_capacity;

namespace {

Tensor capacities(const std::vector<int64_t>& values) {
  return torch::tensor(values, torch::kLong);
}

// The tokens that expert e keeps.
std::vector<int64_t> kept(const Tensor& indices, int64_t e) {
  const Tensor tokens = std::get<0>(indices.eq(e).max(1)).nonzero().flatten();
  return {tokens.data_ptr<int64_t>(), tokens.data_ptr<int64_t>() + tokens.numel()};
}

}  // namespace

TEST_CASE("limit_capacity: the fixture", "[limit_capacity]") {
  using Kept = std::vector<std::vector<int64_t>>;
  const std::vector<std::pair<std::string, Kept>> table = {
      {"choice", {{1, 5, 8}, {0, 6, 10}, {0, 3, 8}, {2, 4, 7}}},
      {"token", {{1, 5, 8}, {0, 1, 3}, {0, 2, 3}, {2, 4, 7}}},
  };
  for (const auto& [order, expected] : table) {
    const Tensor limited = limit_capacity(fixture_indices(), capacities({3, 3, 3, 3}), order);
    for (int64_t e = 0; e < 4; ++e) {
      INFO(order << " expert " << e);
      CHECK(kept(limited, e) == expected[static_cast<size_t>(e)]);
    }
    CHECK((limited.eq(fixture_indices()) | limited.eq(-1)).all().item<bool>());
  }
}

TEST_CASE("limit_capacity: values", "[limit_capacity]") {
  const std::vector<std::vector<int64_t>> some = {{3, 3, 3, 3}, {0, 1, 2, 9}, {-5, 2, -1, 1}};
  for (const auto& [name, indices] : choices()) {
    for (const std::string order : {"choice", "token"}) {
      for (const auto& capacity : some) {
        INFO(name << " " << order);
        const Tensor c = capacities(capacity);
        const Tensor expected = torchmoe::reference::limit_capacity(indices, capacity, order);
        CHECK(torch::equal(limit_capacity(indices, c, order), expected));
        CHECK(torch::equal(limit_capacity(indices.t().contiguous().t(), c, order), expected));
        const Tensor priority = wave(indices.sizes(), 0.7).mul(2).round();
        CHECK(
            torch::equal(limit_capacity(indices, c, order, priority),
                         torchmoe::reference::limit_capacity(indices, capacity, order, priority)));
      }
    }
  }
}

TEST_CASE("limit_capacity: priority", "[limit_capacity]") {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  const Tensor indices = ids({{0}, {0}, {0}, {0}, {0}});
  const Tensor priority = torch::tensor({{nan}, {-inf}, {1.}, {inf}, {1.}});
  const std::vector<Tensor> by_capacity = {ids({{-1}, {-1}, {-1}, {-1}, {-1}}),
                                           ids({{-1}, {-1}, {-1}, {0}, {-1}}),
                                           ids({{-1}, {-1}, {0}, {0}, {-1}}),
                                           ids({{-1}, {-1}, {0}, {0}, {0}}),
                                           ids({{-1}, {0}, {0}, {0}, {0}}),
                                           ids({{0}, {0}, {0}, {0}, {0}})};
  for (int64_t c = 0; c <= 5; ++c) {
    for (const auto dtype : {torch::kFloat64, torch::kFloat32, torch::kBFloat16}) {
      CHECK(torch::equal(limit_capacity(indices, capacities({c}), "choice", priority.to(dtype)),
                         by_capacity[static_cast<size_t>(c)]));
    }
  }
}

TEST_CASE("limit_capacity: empty", "[limit_capacity]") {
  CHECK(limit_capacity(ids({}).view({0, 2}), capacities({1, 1})).sizes() == at::IntArrayRef{0, 2});
  CHECK(torch::equal(limit_capacity(ids({{0, 1}}), capacities({})), ids({{-1, -1}})));
}

TEST_CASE("limit_capacity: errors", "[limit_capacity]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor indices = ids({{0, 1}, {1, 0}}), capacity = capacities({1, 1});
  CHECK_THROWS_WITH(limit_capacity(indices[0], capacity),
                    contains("limit_capacity: indices must be [num_tokens, top_k], got shape [2]"));
  CHECK_THROWS_WITH(limit_capacity(indices.to(torch::kInt), capacity),
                    contains("limit_capacity: indices must be Long, got Int"));
  CHECK_THROWS_WITH(limit_capacity(indices, indices),
                    contains("limit_capacity: capacity must be [num_experts], got shape [2, 2]"));
  CHECK_THROWS_WITH(limit_capacity(indices, capacity.to(torch::kFloat)),
                    contains("limit_capacity: capacity must be Long, got Float"));
  CHECK_THROWS_AS(limit_capacity(indices, capacity, "random"), c10::ValueError);
  CHECK_THROWS_WITH(
      limit_capacity(indices, capacity, "random"),
      contains(R"(limit_capacity: order must be one of "choice", "token", got "random")"));
  CHECK_THROWS_WITH(limit_capacity(indices, capacity, "token", std::nullopt, "spill"),
                    contains(R"(limit_capacity: overflow must be one of "drop", got "spill")"));
  CHECK_THROWS_WITH(limit_capacity(indices, capacity, "token", torch::zeros({2})),
                    contains("limit_capacity: priority must be [") && contains("got shape [2]"));
  CHECK_THROWS_WITH(limit_capacity(indices, capacity, "token", indices),
                    contains("limit_capacity: priority must be float32"));
}
