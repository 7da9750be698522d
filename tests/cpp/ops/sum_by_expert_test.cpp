#include "ops/sum_by_expert.h"

#include <cmath>

#include "ops/dispatch_plan.h"
#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::dispatch_plan;
using torchmoe::sum_by_expert;

TEST_CASE("sum_by_expert: values", "[sum_by_expert]") {
  for (const auto& [name, indices] : choices()) {
    const auto plan = dispatch_plan(indices, 4);
    for (const auto dtype : kFloatTypes) {
      INFO(name << " " << dtype);
      const Tensor rows = wave({plan.row_to_slot.size(0), 7}, 0, 1, dtype);
      const Tensor expected = torchmoe::reference::sum_by_expert(rows, plan.expert_offsets);
      CHECK(difference(sum_by_expert(rows, plan.expert_offsets), expected, rows.size(0)) == "");
      CHECK(torch::equal(sum_by_expert(strided(rows), plan.expert_offsets),
                         sum_by_expert(rows, plan.expert_offsets)));
    }
  }
}

TEST_CASE("sum_by_expert: nobody's rows are not read", "[sum_by_expert]") {
  const auto plan = dispatch_plan(ids({{-1, 4}, {1, -1}}), 4);
  Tensor rows = wave({4, 3});
  rows.slice(0, 1).fill_(std::nan(""));
  const Tensor sums = sum_by_expert(rows, plan.expert_offsets);
  CHECK(torch::equal(sums[1], rows[0]));
  CHECK(torch::equal(sums.slice(0, 2), torch::zeros({2, 3}, torch::kDouble)));
}

TEST_CASE("sum_by_expert: gradients", "[sum_by_expert]") {
  for (const auto& [name, indices] : choices()) {
    INFO(name);
    const auto plan = dispatch_plan(indices, 4);
    const auto function = [plan = plan](const Tensors& in) {
      return sum_by_expert(in[0], plan.expert_offsets);
    };
    const Tensor rows = leaf({plan.row_to_slot.size(0), 3});
    CHECK(gradcheck(function, {rows}).message == "");
    CHECK(gradgradcheck(function, {rows}).message == "");
  }
}

TEST_CASE("sum_by_expert: errors", "[sum_by_expert]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor rows = torch::zeros({4, 3});
  const Tensor offsets = ids({{0, 2, 4}})[0];
  CHECK_THROWS_WITH(sum_by_expert(rows[0], offsets),
                    contains("sum_by_expert: rows must be [num_rows, hidden_size], got shape [3]"));
  CHECK_THROWS_WITH(sum_by_expert(rows.to(torch::kLong), offsets),
                    contains("sum_by_expert: rows must be float32"));
  CHECK_THROWS_WITH(sum_by_expert(rows, offsets.slice(0, 0, 0)),
                    contains("sum_by_expert: expert_offsets must be [num_experts + 1]"));
}
