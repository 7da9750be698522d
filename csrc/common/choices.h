// The enumerations behind the ops' string arguments. A string that is not listed is refused with
// the list.
#pragma once

#include <array>
#include <sstream>
#include <string_view>
#include <utility>

#include <c10/util/Exception.h>

namespace torchmoe {

enum class ScoreFunction { softmax, sigmoid };
enum class Normalize { none, topk, uniform };
enum class GateEstimator { exact, straight_through };
enum class CapacityOrder { choice, token };
enum class Overflow { drop, next_best, backup };
enum class Rounding { up, down };

template <typename Enum, std::size_t size>
using Choices = std::array<std::pair<std::string_view, Enum>, size>;

template <typename Enum, std::size_t size>
Enum choose(std::string_view op,
            std::string_view argument,
            std::string_view given,
            const Choices<Enum, size>& choices) {
  std::ostringstream allowed;
  const char* separator = "";
  for (const auto& [name, value] : choices) {
    if (name == given) {
      return value;
    }
    allowed << separator << '"' << name << '"';
    separator = ", ";
  }
  C10_THROW_ERROR(
      ValueError,
      c10::str(op, ": ", argument, " must be one of ", allowed.str(), ", got \"", given, "\""));
}

inline ScoreFunction choose_score_function(std::string_view op, std::string_view given) {
  static constexpr Choices<ScoreFunction, 2> choices{
      {{"softmax", ScoreFunction::softmax}, {"sigmoid", ScoreFunction::sigmoid}}};
  return choose(op, "score_function", given, choices);
}

inline Normalize choose_normalize(std::string_view op, std::string_view given) {
  static constexpr Choices<Normalize, 3> choices{
      {{"none", Normalize::none}, {"topk", Normalize::topk}, {"uniform", Normalize::uniform}}};
  return choose(op, "normalize", given, choices);
}

inline GateEstimator choose_estimator(std::string_view op, std::string_view given) {
  static constexpr Choices<GateEstimator, 2> choices{
      {{"exact", GateEstimator::exact}, {"straight_through", GateEstimator::straight_through}}};
  return choose(op, "estimator", given, choices);
}

inline CapacityOrder choose_order(std::string_view op, std::string_view given) {
  static constexpr Choices<CapacityOrder, 2> choices{
      {{"choice", CapacityOrder::choice}, {"token", CapacityOrder::token}}};
  return choose(op, "order", given, choices);
}

inline Overflow choose_overflow(std::string_view op, std::string_view given) {
  static constexpr Choices<Overflow, 3> choices{
      {{"drop", Overflow::drop}, {"next_best", Overflow::next_best}, {"backup", Overflow::backup}}};
  return choose(op, "overflow", given, choices);
}

inline Rounding choose_rounding(std::string_view op, std::string_view given) {
  static constexpr Choices<Rounding, 2> choices{{{"up", Rounding::up}, {"down", Rounding::down}}};
  return choose(op, "rounding", given, choices);
}

}  // namespace torchmoe
