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
  const std::vector<std::vector<int64_t>> some = {{3, 3, 3, 3}, {0, 1, 2, 9}, {0, 2, 0, 1}};
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
        // Coarse scores, so that ties occur.
        const Tensor scores = wave({indices.size(0), 4}, 1.3).mul(3).round();
        for (const std::string overflow : {"next_best", "backup"}) {
          const std::vector<int64_t> table = {2, 3, 0, 1};
          const auto backup =
              overflow == "backup" ? std::optional(capacities(table)) : std::nullopt;
          for (const auto& by : {std::optional<Tensor>(), std::optional(priority)}) {
            CHECK(torch::equal(limit_capacity(indices, c, order, by, overflow, scores, backup),
                               torchmoe::reference::limit_capacity(
                                   indices, capacity, order, by, overflow, scores, table)));
          }
        }
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

// Four tokens that all want expert 0, and three of them expert 1. Expert 0 takes two slots, expert 1
// one, the others two.
TEST_CASE("limit_capacity: overflow worked by hand", "[limit_capacity]") {
  const double nan = std::nan("");
  const Tensor indices = ids({{0, 1}, {0, 1}, {0, 2}, {0, 1}}), capacity = capacities({2, 1, 2, 2});
  const Tensor scores = torch::tensor(
      {{.9, .8, .1, .2}, {.9, .8, .3, .3}, {.9, .1, .8, .7}, {.9, .8, .2, nan}}, torch::kDouble);
  const Tensor backup = capacities({2, 3, 0, 0});
  const Tensor last_first = torch::tensor({{1., 0.}, {3., 2.}, {5., 4.}, {7., 6.}});
  struct Row {
    const char* overflow;
    const char* order;
    std::optional<Tensor> priority;
    Tensor expected;
  };
  const std::vector<Row> table = {
      {"drop", "token", {}, ids({{0, 1}, {0, -1}, {-1, 2}, {-1, -1}})},
      {"drop", "choice", {}, ids({{0, 1}, {0, -1}, {-1, 2}, {-1, -1}})},
      {"drop", "token", last_first, ids({{-1, -1}, {-1, -1}, {0, 2}, {0, 1}})},
      // Token 1's second choice finds a tie of 2 and 3; token 2's first may not go to 2, which its
      // second still waits for; for token 3's second nothing is left.
      {"next_best", "token", {}, ids({{0, 1}, {0, 2}, {3, 2}, {3, -1}})},
      // Token 3's first choice comes before anybody's second and gets its best, 2.
      {"next_best", "choice", {}, ids({{0, 1}, {0, 2}, {3, -1}, {2, 3}})},
      {"next_best", "token", last_first, ids({{3, -1}, {2, 3}, {0, 2}, {0, 1}})},
      // Token 1's second choice goes to the backup 3 of expert 1; token 2 holds the backup 2 of
      // expert 0 already and goes to its best; token 3's second finds its backup full.
      {"backup", "token", {}, ids({{0, 1}, {0, 3}, {3, 2}, {2, -1}})},
      {"backup", "choice", {}, ids({{0, 1}, {0, 3}, {3, 2}, {2, -1}})},
      {"backup", "token", last_first, ids({{3, -1}, {2, 3}, {0, 2}, {0, 1}})},
  };
  for (const auto& row : table) {
    const std::string overflow = row.overflow;
    for (const auto dtype : {torch::kFloat64, torch::kFloat32, torch::kBFloat16}) {
      INFO(overflow << " " << row.order << " " << dtype);
      const auto by_score = overflow == "drop" ? std::nullopt : std::optional(scores.to(dtype));
      const auto by_table = overflow == "backup" ? std::optional(backup) : std::nullopt;
      CHECK(torch::equal(
          limit_capacity(indices, capacity, row.order, row.priority, overflow, by_score, by_table),
          row.expected));
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
  CHECK_THROWS_WITH(
      limit_capacity(indices, capacity, "token", std::nullopt, "spill"),
      contains(R"(limit_capacity: overflow must be one of "drop", "next_best", "backup", got )"));
  CHECK_THROWS_WITH(limit_capacity(indices, capacity, "token", torch::zeros({2})),
                    contains("limit_capacity: priority must be [") && contains("got shape [2]"));
  CHECK_THROWS_WITH(limit_capacity(indices, capacity, "token", indices),
                    contains("limit_capacity: priority must be float32"));
  const Tensor scores = torch::zeros({2, 2}), backup = capacities({1, 0});
  const auto with = [&](const char* overflow,
                        const std::optional<Tensor>& by_score,
                        const std::optional<Tensor>& by_table) {
    return limit_capacity(indices, capacity, "token", {}, overflow, by_score, by_table);
  };
  CHECK_THROWS_WITH(with("next_best", {}, {}),
                    contains(R"(scores must be given with overflow "next_best", got None)"));
  CHECK_THROWS_WITH(with("drop", scores, {}),
                    contains(R"(scores must be None with overflow "drop", got a tensor)"));
  CHECK_THROWS_WITH(with("backup", scores, {}),
                    contains(R"(backup must be given with overflow "backup", got None)"));
  CHECK_THROWS_WITH(with("next_best", scores, backup),
                    contains(R"(backup must be None with overflow "next_best", got a tensor)"));
  CHECK_THROWS_WITH(with("next_best", torch::zeros({2, 3}), {}),
                    contains("limit_capacity: scores must be [num_tokens, num_experts] = [2, 2], "
                             "got shape [2, 3]"));
  CHECK_THROWS_WITH(with("next_best", indices, {}),
                    contains("limit_capacity: scores must be float32"));
  CHECK_THROWS_WITH(with("backup", scores, capacities({1})),
                    contains("limit_capacity: backup must be [num_experts] = [2], got shape [1]"));
  CHECK_THROWS_WITH(with("backup", scores, backup.to(torch::kInt)),
                    contains("limit_capacity: backup must be Long, got Int"));
  CHECK_THROWS_AS(limit_capacity(indices, capacities({1, -3})), c10::ValueError);
  CHECK_THROWS_WITH(
      limit_capacity(indices, capacities({1, -3})),
      contains("limit_capacity: capacity must be >= 0 for every expert, got -3 for expert 1"));
  for (const int64_t other : {-1, 1, 2}) {
    CHECK_THROWS_WITH(with("backup", scores, capacities({1, other})),
                      contains("limit_capacity: backup must be another expert in [0, 2) for every "
                               "expert, got " +
                               std::to_string(other) + " for expert 1"));
  }
}
