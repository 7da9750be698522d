// The layer keeps every law of torchmoe/testing.h.
#include <optional>
#include <string>
#include <vector>

#include "catch2.h"
#include "nn/moe.h"
#include "support.h"
#include "testing.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::nn::CapacityOptions;
using torchmoe::nn::GateOptions;
using torchmoe::nn::MoE;
using torchmoe::nn::MoEOptions;
using torchmoe::testing::Certificate;
using torchmoe::testing::certify;
using torchmoe::testing::Tensors;

namespace {

MoEOptions sizes() {
  return MoEOptions(4, 3, 4, 2).balance_weight(0.1).z_loss_weight(0.01);
}

Certificate certificate_of(const MoEOptions& options, bool decides_per_token = true) {
  MoE moe(options);
  moe->to(torch::kFloat64);
  const auto forward = [&](const Tensor& x, const Tensor& mask) -> Tensors {
    const auto out = moe->forward(x, mask.defined() ? std::optional(mask) : std::nullopt);
    return {out.hidden_states, out.aux_loss};
  };
  const auto selection = [&](const Tensor& x) { return moe->forward(x).routing.indices; };
  return certify({.forward = forward,
                  .parameters = moe->named_parameters().pairs(),
                  .selection = selection,
                  .by_expert = moe->named_parameters().keys(),
                  .decides_per_token = decides_per_token},
                 wave({9, 4}, 0.3, 1, torch::kFloat64));
}

}  // namespace

TEST_CASE("MoE keeps the laws", "[nn]") {
  torch::manual_seed(0);
  const auto holds = [](const Certificate& certificate, size_t laws) {
    INFO(certificate.to_string());
    CHECK(certificate);
    CHECK(certificate.held.size() == laws);
  };
  holds(certificate_of(sizes()), 7);
  holds(certificate_of(sizes().bias(true).activation("gelu")), 7);
  holds(certificate_of(sizes().gate(GateOptions().score_function("sigmoid").normalize("none"))), 7);
  holds(certificate_of(sizes().capacity(CapacityOptions(0.75)), /*decides_per_token=*/false), 6);
}
