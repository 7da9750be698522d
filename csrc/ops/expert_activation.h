#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace torchmoe {

struct ChosenActivation;

/// The experts' activation by name, and what a gated one does besides f(gate) * up:
///
///     a = softcap(g, gate_softcap) * s(alpha * g) * (softcap(v, up_softcap) + up_offset)
///     g = min(gate, limit),  v = up within [-limit, limit],  softcap(x, c) = c * tanh(x / c)
///
/// with f(u) = u * s(u). A limit or cap that is absent changes nothing. The gradient at a bound is
/// that inside of it. With `interleaved`, gate and up alternate among the rows of w_in and b_in;
/// otherwise all gates come first.
///
/// swiglu with alpha 1.702, limit 7 and up_offset 1, interleaved, is the activation of gpt-oss
/// (OpenAI 2025, arXiv 2508.10925); with softcaps, that of Inkling 2.
struct ExpertActivation {
  // A name alone stands for itself, from whatever a caller has it in.
  ExpertActivation(const char* name) : ExpertActivation(std::string_view(name)) {}
  ExpertActivation(const std::string& name) : ExpertActivation(std::string_view(name)) {}
  ExpertActivation(std::string_view name,
                   double alpha = 1,
                   std::optional<double> limit = std::nullopt,
                   double up_offset = 0,
                   std::optional<double> gate_softcap = std::nullopt,
                   std::optional<double> up_softcap = std::nullopt,
                   bool interleaved = false)
      : name(name),
        alpha(alpha),
        limit(limit),
        up_offset(up_offset),
        gate_softcap(gate_softcap),
        up_softcap(up_softcap),
        interleaved(interleaved) {}

  std::string_view name;
  double alpha;
  std::optional<double> limit;
  double up_offset;
  std::optional<double> gate_softcap;
  std::optional<double> up_softcap;
  bool interleaved;

  auto fields() const {
    return std::tie(name, alpha, limit, up_offset, gate_softcap, up_softcap, interleaved);
  }
};

/// The activation as kernels are given it; refuses an unknown name and settings out of range.
ChosenActivation choose_activation(std::string_view op, const ExpertActivation& given);

}  // namespace torchmoe
