#include "nn/capacity.h"

#include "catch2.h"
#include "nn/expert_capacity.h"
#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::Capacity;

namespace {

std::vector<int64_t> entries(const Tensor& slots) {
  const auto whole = slots.contiguous();
  return {whole.data_ptr<int64_t>(), whole.data_ptr<int64_t>() + whole.numel()};
}

}  // namespace

TEST_CASE("Capacity gives each expert its slots", "[nn]") {
  const auto like = torch::empty({0});
  const auto slots = [&](const Capacity& capacity, bool training) {
    const auto number = entries(capacity.slots(like, 12, 4, 2, training));
    CHECK(entries(capacity.slots(like, torch::tensor(12), 4, 2, training)) == number);
    return number;
  };
  CHECK(slots(Capacity(1.1), true) == std::vector<int64_t>(4, 7));
  CHECK(slots(Capacity(1.1).rounding("down"), true) == std::vector<int64_t>(4, 6));
  CHECK(slots(Capacity(1.1).eval_factor(0.5), false) == std::vector<int64_t>(4, 3));
  CHECK(slots(Capacity(0.1).minimum(5), true) == std::vector<int64_t>(4, 5));
  CHECK(slots(Capacity(100), true) == std::vector<int64_t>(4, 12));
}

TEST_CASE("a dynamic Capacity follows usage", "[nn]") {
  const auto like = torch::empty({0});
  const auto usage = torch::tensor({0.5, 0.25, 0.125, 0.125});
  const Capacity capacity = Capacity(1).dynamic(true).minimum(7);
  const std::vector<int64_t> expected{12, 7, 7, 7};
  CHECK(entries(capacity.slots(like, 12, 4, 2, true, usage)) == expected);
  CHECK(entries(capacity.slots(like, torch::tensor(12), 4, 2, true, usage)) == expected);
  CHECK_THROWS_WITH(capacity.slots(like, 12, 4, 2, true),
                    contains("Capacity: usage must be a tensor, got None"));
}

TEST_CASE("dynamic_capacity gives more room where the load has been high", "[nn]") {
  using torchmoe::dynamic_capacity;
  const auto usage = torch::tensor({0.4, 0.3, 0.2, 0.1}, torch::kFloat64);
  const std::vector<int64_t> expected{16, 12, 10, 10};  // of 40 slots, ten each
  CHECK(entries(dynamic_capacity(usage, 40)) == expected);
  CHECK(entries(dynamic_capacity(usage, torch::tensor(40))) == expected);
  CHECK(entries(dynamic_capacity(usage, 40, 0.5)) == std::vector<int64_t>{8, 6, 5, 5});
  CHECK(entries(dynamic_capacity(usage, 0)) == std::vector<int64_t>(4, 0));
  CHECK(entries(dynamic_capacity(usage * NAN, 40)) == std::vector<int64_t>(4, 10));
  CHECK_THROWS_WITH(dynamic_capacity(torch::ones({2, 2}), 4),
                    contains("dynamic_capacity: usage must be [num_experts] and floating, got "));
  CHECK_THROWS_WITH(dynamic_capacity(usage, -1),
                    contains("dynamic_capacity: num_slots must be >= 0, got -1"));
  CHECK_THROWS_WITH(dynamic_capacity(usage, torch::tensor({1, 2})),
                    contains("dynamic_capacity: num_slots must be an int or a scalar, got shape "));
  CHECK_THROWS_WITH(
      dynamic_capacity(usage, torch::tensor(1.5)),
      contains("dynamic_capacity: num_slots must be an int or an int64 tensor, got a tensor of "));
}
