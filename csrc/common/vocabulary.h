// Words that stand for an enumerator: each vocabulary is one table, from which the enumeration, the
// choice by name and the names in Python follow. A word that is not listed is refused with the list.
#pragma once

#include <array>
#include <sstream>
#include <string_view>
#include <utility>

#include <c10/util/Exception.h>

#include "activation_names.h"

namespace torchmoe {

/// kArgument: what messages call the argument; kWords: name and doc of every enumerator, in order.
template <typename Enum>
struct Vocabulary;

#define TORCHMOE_ENUMERATOR(name, doc) name,
#define TORCHMOE_WORD(name, doc) std::pair{std::string_view(#name), std::string_view(doc)},
#define TORCHMOE_VOCABULARY(Enum, argument, TABLE)            \
  enum class Enum { TABLE(TORCHMOE_ENUMERATOR) };             \
  template <>                                                 \
  struct Vocabulary<Enum> {                                   \
    static constexpr std::string_view kArgument = argument;   \
    static constexpr std::array kWords{TABLE(TORCHMOE_WORD)}; \
  };

#define TORCHMOE_SCORE_FUNCTIONS(X)                     \
  X(softmax, "exp(logit) over the sum of all experts'") \
  X(sigmoid, "1 / (1 + exp(-logit)), each expert by itself")
TORCHMOE_VOCABULARY(ScoreFunction, "score_function", TORCHMOE_SCORE_FUNCTIONS)

#define TORCHMOE_NORMALIZES(X)                             \
  X(none, "the scores themselves")                         \
  X(topk, "the scores over the sum of the token's slots'") \
  X(uniform, "1 over the number of the token's slots")
TORCHMOE_VOCABULARY(Normalize, "normalize", TORCHMOE_NORMALIZES)

#define TORCHMOE_GATE_ESTIMATORS(X)         \
  X(exact, "the derivative of the weights") \
  X(straight_through, "normalisation as the identity")
TORCHMOE_VOCABULARY(GateEstimator, "estimator", TORCHMOE_GATE_ESTIMATORS)

#define TORCHMOE_CAPACITY_ORDERS(X)                    \
  X(choice, "all first choices, then all second ones") \
  X(token, "token by token")
TORCHMOE_VOCABULARY(CapacityOrder, "order", TORCHMOE_CAPACITY_ORDERS)

#define TORCHMOE_OVERFLOWS(X)                            \
  X(drop, "the slot is dropped")                         \
  X(next_best, "to the best other expert that has room") \
  X(backup, "to the expert's backup, else as next_best")
TORCHMOE_VOCABULARY(Overflow, "overflow", TORCHMOE_OVERFLOWS)

/// When a layer with a capacity normalises weights.
#define TORCHMOE_NORMALIZED(X)                           \
  X(before_drop, "dropped slots count, and lose weight") \
  X(after_drop, "over the slots that are left")
TORCHMOE_VOCABULARY(Normalized, "normalize", TORCHMOE_NORMALIZED)

#define TORCHMOE_ROUNDINGS(X) \
  X(up, "the ceiling")        \
  X(down, "the floor")
TORCHMOE_VOCABULARY(Rounding, "rounding", TORCHMOE_ROUNDINGS)

/// Which slots an expert serves first, if not by the order.
#define TORCHMOE_PRIORITIES(X)                    \
  X(random, "a draw for every slot, in training") \
  X(weight, "the larger combine weight first")
TORCHMOE_VOCABULARY(Priority, "priority", TORCHMOE_PRIORITIES)

/// Where the fractions of a layer's load_balancing_loss come from.
#define TORCHMOE_FRACTIONS_FROM(X)                           \
  X(batch, "the tokens of the call")                         \
  X(sequence, "each sequence, the losses averaged")          \
  X(global_batch, "the calls of all processes, in training") \
  X(history, "the router's usage")
TORCHMOE_VOCABULARY(FractionFrom, "fraction_from", TORCHMOE_FRACTIONS_FROM)

#define TORCHMOE_FRACTION_CHOICES(X)     \
  X(all, "all choices of a token count") \
  X(first, "its first choice only")
TORCHMOE_VOCABULARY(FractionChoices, "fraction_choices", TORCHMOE_FRACTION_CHOICES)

/// Which entry of a full cache gives way.
#define TORCHMOE_EVICTIONS(X)                 \
  X(lru, "the one that was used longest ago") \
  X(lfu, "the one that was used least often, then longest ago")
TORCHMOE_VOCABULARY(Eviction, "eviction", TORCHMOE_EVICTIONS)

/// The gradient estimators that a layer knows by name.
#define TORCHMOE_LAYER_ESTIMATORS(X)                                 \
  X(exact, "the derivative of the weights")                          \
  X(straight_through, "selection and normalisation as the identity") \
  X(straight_through_dense, "the same over every expert, chosen or not")
TORCHMOE_VOCABULARY(LayerEstimator, "estimator", TORCHMOE_LAYER_ESTIMATORS)

template <>
struct Vocabulary<Activation> {
  static constexpr std::string_view kArgument = "activation";
#define TORCHMOE_ACTIVATION_WORD(name, f, kind, doc) TORCHMOE_WORD(name, doc)
  static constexpr std::array kWords{TORCHMOE_ACTIVATIONS(TORCHMOE_ACTIVATION_WORD)};
#undef TORCHMOE_ACTIVATION_WORD
};

template <typename Enum>
Enum choose(std::string_view op, std::string_view given) {
  int place = 0;
  for (const auto& [name, doc] : Vocabulary<Enum>::kWords) {
    if (name == given) {
      return static_cast<Enum>(place);
    }
    ++place;
  }
  std::ostringstream allowed;
  const char* separator = "";
  for (const auto& [name, doc] : Vocabulary<Enum>::kWords) {
    allowed << separator << '"' << name << '"';
    separator = ", ";
  }
  C10_THROW_ERROR(ValueError,
                  c10::str(op,
                           ": ",
                           Vocabulary<Enum>::kArgument,
                           " must be one of ",
                           allowed.str(),
                           ", got \"",
                           given,
                           "\""));
}

}  // namespace torchmoe
