#include "ops/expert_activation.h"

#include <cmath>
#include <limits>

#include "common/activation.h"
#include "common/checks.h"
#include "common/vocabulary.h"

namespace torchmoe {

namespace {

void check_bound(std::string_view op, std::string_view name, const std::optional<double>& bound) {
  TORCH_CHECK_VALUE(
      !bound || *bound > 0, op, ": ", name, " must be positive or absent, got ", *bound);
}

}  // namespace

ChosenActivation choose_activation(std::string_view op, const ExpertActivation& given) {
  const auto name = choose<Activation>(op, given.name);
  constexpr double kNone = std::numeric_limits<double>::infinity();
  TORCH_CHECK_VALUE(std::isfinite(given.alpha) && given.alpha > 0,
                    op,
                    ": alpha must be positive and finite, got ",
                    given.alpha);
  TORCH_CHECK_VALUE(
      std::isfinite(given.up_offset), op, ": up_offset must be finite, got ", given.up_offset);
  check_bound(op, "limit", given.limit);
  check_bound(op, "gate_softcap", given.gate_softcap);
  check_bound(op, "up_softcap", given.up_softcap);
  const Gating gating{given.alpha,
                      given.limit.value_or(kNone),
                      given.up_offset,
                      given.gate_softcap.value_or(kNone),
                      given.up_softcap.value_or(kNone),
                      /*is_plain=*/given.alpha == 1 && given.up_offset == 0 && !given.limit &&
                          !given.gate_softcap && !given.up_softcap,
                      given.interleaved};
  TORCH_CHECK_VALUE(is_gated(name) || (gating.is_plain && !gating.interleaved),
                    op,
                    ": activation must be a gated one where alpha, limit, up_offset, gate_softcap, "
                    "up_softcap or interleaved is given, got \"",
                    given.name,
                    "\"");
  return {name, gating};
}

}  // namespace torchmoe
