#include "nn/balance.h"

#include <algorithm>
#include <ostream>

#include "common/vocabulary.h"
#include "nn/detail/checks.h"
#include "nn/detail/shown.h"

namespace torchmoe::nn {

void Balance::check() const {
  constexpr auto owner = "Balance";
  const auto from = choose<FractionFrom>(owner, fraction_from_);
  const auto choices = choose<FractionChoices>(owner, fraction_choices_);
  TORCH_CHECK_VALUE(
      from != FractionFrom::history || choices == FractionChoices::all,
      "Balance: fraction_choices must be \"all\" with fraction_from \"history\", got \"",
      fraction_choices_,
      "\"");
  check_not_negative(owner, "weight", weight_);
  check_not_negative(owner, "z_loss_weight", z_loss_weight_);
  check_not_negative(owner, "selection_bias_rate", selection_bias_rate_);
  std::vector<std::string> names{"load_balancing_loss"};
  if (z_loss_weight_ > 0) {
    names.emplace_back("router_z_loss");
  }
  for (const auto& term : losses_) {
    TORCH_CHECK_TYPE(term.function,
                     "Balance: losses must hold a function in each term, got none for \"",
                     term.name,
                     "\"");
    check_not_negative(owner, "the weight of \"" + term.name + '"', term.weight);
    TORCH_CHECK_VALUE(std::find(names.begin(), names.end(), term.name) == names.end(),
                      "Balance: losses must name every term once, router_z_loss here or by "
                      "z_loss_weight, and load_balancing_loss by weight, got \"",
                      term.name,
                      "\"");
    names.push_back(term.name);
  }
}

std::ostream& operator<<(std::ostream& stream, const Balance& balance) {
  const Balance neutral;
  Shown shown(stream, "Balance");
  shown.show("weight", balance.weight(), neutral.weight())
      .show("z_loss_weight", balance.z_loss_weight(), neutral.z_loss_weight());
  if (!balance.losses().empty()) {
    std::vector<std::pair<std::string, double>> pairs;
    for (const auto& term : balance.losses()) {
      pairs.emplace_back(term.name, term.weight);
    }
    shown.show("losses", pairs);
  }
  return shown.show("fraction_from", balance.fraction_from(), neutral.fraction_from())
      .show("fraction_choices", balance.fraction_choices(), neutral.fraction_choices())
      .show("selection_bias_rate", balance.selection_bias_rate(), neutral.selection_bias_rate())
      .show("selection_bias_centred",
            balance.selection_bias_centred(),
            neutral.selection_bias_centred())
      .end();
}

}  // namespace torchmoe::nn
