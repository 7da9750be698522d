#include "ops/vocabulary.h"

#include <torch/library.h>

#include "common/activation.h"
#include "common/vocabulary.h"

namespace torchmoe {

namespace {

struct Words {
  std::vector<std::string> names;
  std::vector<std::string> docs;

  void add(std::string_view name, std::string_view doc) {
    names.emplace_back(name);
    docs.emplace_back(doc);
  }
};

/// Appends the words of Enum if that is the one asked for.
template <typename Enum>
void add_if_asked(std::string_view argument, Words& words) {
  if (Vocabulary<Enum>::kArgument == argument) {
    for (const auto& [name, doc] : Vocabulary<Enum>::kWords) {
      words.add(name, doc);
    }
  }
}

void add_activations(ActivationKind kind, Words& words) {
  for (const auto& [name, doc] : Vocabulary<Activation>::kWords) {
    if (kind_of(choose<Activation>("vocabulary", name)) == kind) {
      words.add(name, doc);
    }
  }
}

}  // namespace

std::tuple<std::vector<std::string>, std::vector<std::string>> vocabulary(
    std::string_view argument) {
  Words words;
  add_if_asked<ScoreFunction>(argument, words);
  add_if_asked<Normalize>(argument, words);
  add_if_asked<GateEstimator>(argument, words);
  add_if_asked<CapacityOrder>(argument, words);
  add_if_asked<Overflow>(argument, words);
  add_if_asked<Rounding>(argument, words);
  add_if_asked<Priority>(argument, words);
  add_if_asked<FractionFrom>(argument, words);
  add_if_asked<FractionChoices>(argument, words);
  add_if_asked<Eviction>(argument, words);
  add_if_asked<Activation>(argument, words);
  if (argument == "plain activation") {
    add_activations(ActivationKind::plain, words);
  } else if (argument == "gated activation") {
    add_activations(ActivationKind::gated, words);
  }
  TORCH_CHECK_VALUE(!words.names.empty(),
                    "_vocabulary: argument must be one whose words are listed, got \"",
                    argument,
                    "\"");
  return {words.names, words.docs};
}

TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("_vocabulary", &vocabulary);
}

}  // namespace torchmoe
