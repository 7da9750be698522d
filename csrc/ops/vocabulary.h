#pragma once

#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace torchmoe {

/// The words that an argument of the ops takes, in order, and a line about each: of score_function,
/// normalize, estimator, order, overflow, rounding and activation, of a layer's priority,
/// fraction_from and fraction_choices, or of the activations of one kind, "plain activation" and
/// "gated activation". Python and the tests take their lists from it.
std::tuple<std::vector<std::string>, std::vector<std::string>> vocabulary(
    std::string_view argument);

}  // namespace torchmoe
