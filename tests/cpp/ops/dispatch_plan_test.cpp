#include "ops/dispatch_plan.h"

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::dispatch_plan;

TEST_CASE("dispatch_plan: the fixture", "[dispatch_plan]") {
  const auto plan = dispatch_plan(fixture_indices(), 4);
  CHECK(torch::equal(plan.expert_offsets.diff(), torch::tensor({4, 7, 8, 5}, torch::kLong)));
  CHECK(same_plan(plan, torchmoe::reference::dispatch_plan(fixture_indices(), 4)));
}

TEST_CASE("dispatch_plan: values", "[dispatch_plan]") {
  for (const auto& [name, indices] : choices()) {
    INFO(name);
    const auto expected = torchmoe::reference::dispatch_plan(indices, 4);
    CHECK(same_plan(dispatch_plan(indices, 4), expected));
    CHECK(same_plan(dispatch_plan(indices.t().contiguous().t(), 4), expected));
  }
}

TEST_CASE("dispatch_plan: a permutation, whatever the ids", "[dispatch_plan]") {
  // Large enough to be split among threads.
  const Tensor indices = wave({4099, 3}).mul(9).round().to(torch::kLong);
  const auto plan = dispatch_plan(indices, 7);
  const Tensor rows = torch::arange(indices.numel());
  CHECK(torch::equal(plan.slot_to_row.flatten().index({plan.row_to_slot}), rows));
  const Tensor sorted = indices.flatten().index({plan.row_to_slot});
  const Tensor key = torch::where(sorted.ge(0) & sorted.lt(7), sorted, 7);
  CHECK(key.diff().ge(0).all().item<bool>());
  CHECK((key.diff().gt(0) | plan.row_to_slot.diff().gt(0)).all().item<bool>());
  CHECK(plan.expert_offsets[7].item<int64_t>() == key.lt(7).sum().item<int64_t>());
}

TEST_CASE("dispatch_plan: empty", "[dispatch_plan]") {
  const Tensor none = torch::empty({0, 2}, torch::kLong);
  const auto plan = dispatch_plan(none, 3);
  CHECK(torch::equal(plan.expert_offsets, torch::zeros({4}, torch::kLong)));
  CHECK(plan.row_to_slot.numel() == 0);
  CHECK(plan.slot_to_row.sizes() == at::IntArrayRef{0, 2});
  CHECK(same_plan(dispatch_plan(ids({{0, 5}}), 0),
                  torchmoe::reference::dispatch_plan(ids({{0, 5}}), 0)));
}

TEST_CASE("dispatch_plan: errors", "[dispatch_plan]") {
  c10::InferenceMode mode(GENERATE(false, true));
  CHECK_THROWS_WITH(dispatch_plan(torch::zeros({3}, torch::kLong), 4),
                    contains("dispatch_plan: indices must be [num_tokens, top_k], got shape [3]"));
  CHECK_THROWS_WITH(dispatch_plan(torch::zeros({3, 2}), 4),
                    contains("dispatch_plan: indices must be Long, got Float"));
  CHECK_THROWS_AS(dispatch_plan(ids({{0}}), -1), c10::ValueError);
  CHECK_THROWS_WITH(dispatch_plan(ids({{0}}), -1),
                    contains("dispatch_plan: num_experts must be in [0, 2147483647], got -1"));
}
