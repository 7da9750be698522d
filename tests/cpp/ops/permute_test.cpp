#include "ops/permute.h"

#include <cmath>

#include "reference.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::dispatch_plan;
using torchmoe::permute;

TEST_CASE("permute: values", "[permute]") {
  for (const auto& [name, indices] : choices()) {
    const auto plan = dispatch_plan(indices, 4);
    for (const auto dtype : kFloatTypes) {
      for (const int64_t hidden : {1, 7, 64}) {
        INFO(name << " " << dtype << " H " << hidden);
        const Tensor x = wave({5, hidden}, 0, 1, dtype);
        const Tensor expected = torchmoe::reference::permute(x, plan).to(dtype);
        CHECK(torch::equal(permute(x, plan), expected));
        CHECK(torch::equal(permute(strided(x), plan), expected));
      }
    }
  }
}

TEST_CASE("permute: nothing leaks from a token without a route", "[permute]") {
  Tensor x = wave({2, 3});
  x[0].fill_(std::nan(""));
  const Tensor rows = permute(x, dispatch_plan(ids({{-1, 4}, {1, -1}}), 4));
  CHECK(torch::equal(rows[0], x[1]));
  CHECK(torch::equal(rows.slice(0, 1), torch::zeros({3, 3}, torch::kDouble)));
}

TEST_CASE("permute: empty", "[permute]") {
  const auto plan = dispatch_plan(torch::empty({0, 2}, torch::kLong), 4);
  CHECK(permute(torch::empty({0, 3}), plan).sizes() == at::IntArrayRef{0, 3});
}

TEST_CASE("permute: gradients", "[permute]") {
  for (const auto& [name, indices] : choices()) {
    INFO(name);
    const auto plan = dispatch_plan(indices, 4);
    const auto function = [plan = plan](const Tensors& in) { return permute(in[0], plan); };
    CHECK(gradcheck(function, {leaf({5, 3})}).message == "");
    CHECK(gradgradcheck(function, {leaf({5, 3})}).message == "");
  }
}

TEST_CASE("permute: errors", "[permute]") {
  c10::InferenceMode mode(GENERATE(false, true));
  const Tensor x = torch::zeros({2, 3});
  const auto plan = dispatch_plan(ids({{0, 1}, {1, 0}}), 2);
  CHECK_THROWS_WITH(permute(x[0], plan),
                    contains("permute: x must be [num_tokens, hidden_size], got shape [3]"));
  CHECK_THROWS_WITH(permute(x.to(torch::kLong), plan), contains("permute: x must be float32"));
  CHECK_THROWS_WITH(permute(torch::zeros({3, 3}), plan),
                    contains("permute: slot_to_row must") && contains("got shape [2, 2]"));
  auto broken = plan;
  broken.row_to_slot = plan.row_to_slot.slice(0, 1);
  CHECK_THROWS_WITH(
      permute(x, broken),
      contains("permute: row_to_slot must be [num_tokens * top_k] = [4], got shape [3]"));
  broken = plan;
  broken.expert_offsets = plan.expert_offsets.to(torch::kInt);
  CHECK_THROWS_WITH(permute(x, broken), contains("permute: expert_offsets must be Long, got Int"));
  broken.expert_offsets = plan.expert_offsets.slice(0, 0, 0);
  CHECK_THROWS_WITH(permute(x, broken),
                    contains("permute: expert_offsets must be [num_experts + 1], got shape [0]"));
}
