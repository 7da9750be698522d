// What a certificate is asked about and what it says.
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

// A layer of experts: T tokens of H numbers each in, T of H out.
struct Layer {
  // y [T, H] for x [T, H], both float64, then any losses, which are scalars. token_mask is [T]
  // bool, false where a token does not count, and undefined where all do. It draws nothing.
  std::function<Tensors(const at::Tensor& x, const at::Tensor& token_mask)> forward;
  // What forward reads and learns: float64 leaves, by name, as
  // `module->named_parameters().pairs()` has them. They are moved in place and put back.
  std::vector<std::pair<std::string, at::Tensor>> parameters;
  // Where the gradients are declared to be another function's, as those of a straight-through
  // estimator are: given tokens, the function x -> {y, losses} whose derivative they are at these
  // tokens. What it is to hold constant it computes when it is asked for. Empty: forward's own.
  std::function<std::function<Tensors(const at::Tensor& x)>(const at::Tensor& x)> surrogate =
      nullptr;
  // The expert ids [T, K], or other integers by token, that forward decides by. Empty: it decides
  // nothing, or nothing near the inputs.
  std::function<at::Tensor(const at::Tensor& x)> selection = nullptr;
  // Names of those parameters whose first dimension counts the experts; without any, exchanging
  // experts is not asked about.
  std::vector<std::string> by_expert = {};
  // Whether forward knows a token_mask.
  bool takes_mask = true;
  // Whether a token's experts depend on that token alone: no capacity, no experts that choose their
  // tokens, no decision for a sequence.
  bool decides_per_token = true;
};

// A law that does not hold.
struct Finding {
  std::string law;
  std::string formula;
  int64_t num_tokens;   // the fewest of the given tokens, from the first on, with which it fails
  std::string message;  // what was expected, and what came instead
  std::string usually;  // what that usually means
};

struct Certificate {
  std::vector<std::string> held;
  std::vector<Finding> failures;
  // Law and reason.
  std::vector<std::pair<std::string, std::string>> not_asked;

  bool passed() const { return failures.empty(); }
  explicit operator bool() const { return passed(); }

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
