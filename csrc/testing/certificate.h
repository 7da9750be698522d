// The subject of a certificate, and its result.
#pragma once

#include <cstdint>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "types.h"

namespace torchmoe::testing {

/// A layer of experts: T tokens of size H in, and as many out.
struct Layer {
  /// y [T, H] for x [T, H], both float64, then any losses, which are scalars. token_mask is [T]
  /// bool, false where a token does not count, and undefined where all do. It draws nothing.
  std::function<Tensors(const at::Tensor& x, const at::Tensor& token_mask)> forward;
  /// The parameters that forward uses: float64 leaves, by name, such as
  /// `module->named_parameters().pairs()`. They are changed in place and restored.
  std::vector<std::pair<std::string, at::Tensor>> parameters;
  /// For gradients that are declared to be those of another function, as for a straight-through
  /// estimator: given tokens, the function x -> {y, losses} whose derivative they are at these
  /// tokens. Values to hold constant are computed when it is created. Empty: forward itself.
  std::function<std::function<Tensors(const at::Tensor& x)>(const at::Tensor& x)> surrogate =
      nullptr;
  /// The expert ids [T, K], or other integers by token, that forward's choices give. Empty: it
  /// makes no choice, or none that changes near the inputs.
  std::function<at::Tensor(const at::Tensor& x)> selection = nullptr;
  /// Names of the parameters whose first dimension is that of the experts; without any, the law
  /// about exchanging experts is not tested.
  std::vector<std::string> by_expert = {};
  /// Whether forward takes a token_mask.
  bool takes_mask = true;
  /// Whether a token's experts depend on that token alone: no capacity, no experts that choose
  /// their tokens, no decision for a sequence.
  bool decides_per_token = true;
};

/// A law that does not hold.
struct Finding {
  std::string law;
  std::string formula;
  int64_t num_tokens;   ///< the fewest of the given tokens, from the first on, that show it
  std::string message;  ///< what was expected, and what came instead
  std::string usually;  ///< what that usually means
};

/// The result of certify: the laws that held, those that failed, and those that were not tested.
struct Certificate {
  std::vector<std::string> held;
  std::vector<Finding> failures;
  /// Law and reason.
  std::vector<std::pair<std::string, std::string>> not_asked;

  bool passed() const { return failures.empty(); }
  explicit operator bool() const { return passed(); }

  /// One line for each law; a failure also has its formula, the message and what it usually means.
  std::string to_string() const {
    std::ostringstream text;
    for (const auto& law : held) {
      text << "holds      " << law << '\n';
    }
    for (const auto& [law, reason] : not_asked) {
      text << "not asked  " << law << ": " << reason << '\n';
    }
    for (const auto& finding : failures) {
      text << "FAILS      " << finding.law << ": " << finding.formula << "\n           with "
           << finding.num_tokens << (finding.num_tokens == 1 ? " token: " : " tokens: ")
           << finding.message << "\n           Usually: " << finding.usually << '\n';
    }
    return text.str();
  }
};

}  // namespace torchmoe::testing
