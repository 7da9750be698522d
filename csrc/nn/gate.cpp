#include "nn/gate.h"

#include "common/vocabulary.h"
#include "nn/detail/checks.h"

namespace torchmoe::nn {

void Gate::check() const {
  constexpr auto owner = "Gate";
  choose<ScoreFunction>(owner, score_function_);
  if (normalize_) {
    choose<Normalize>(owner, *normalize_);
  }
  if (const auto* name = std::get_if<std::string>(&estimator_)) {
    choose<LayerEstimator>(owner, *name);
  } else {
    TORCH_CHECK_TYPE(std::get<std::shared_ptr<Estimator>>(estimator_),
                     "Gate: estimator must be a name or an Estimator, got a null pointer");
  }
  check_at_least(owner, "num_groups", num_groups_, 1);
  check_at_least(owner, "top_groups", top_groups_, 1);
  TORCH_CHECK_VALUE(top_groups_ <= num_groups_,
                    "Gate: top_groups must be in [1, ",
                    num_groups_,
                    "], the number of groups, got ",
                    top_groups_);
}

}  // namespace torchmoe::nn
