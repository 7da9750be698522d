#include "training.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include <torch/nn/functional/loss.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/types.h>
#include <torch/utils.h>

namespace {

constexpr double kPeakRate = 3e-3;
constexpr double kLastRate = 0.05;  // of the peak
constexpr int64_t kWarmup = 50;     // steps
constexpr double kLargestGradient = 1.0;

/// Rises in a straight line, then falls along half a cosine.
double learning_rate(int64_t step, int64_t steps) {
  const double rise = std::min(1.0, static_cast<double>(step) / kWarmup);
  const double fall = 0.5 * (1 + std::cos(std::numbers::pi * step / steps));
  return kPeakRate * rise * (kLastRate + (1 - kLastRate) * fall);
}

/// Mean or sum, in nats, of what the bytes after the first of each window cost.
at::Tensor loss(const at::Tensor& logits,   // [B, S, kVocabulary]
                const at::Tensor& windows,  // [B, S + 1]
                torch::nn::functional::CrossEntropyFuncOptions::reduction_t reduction) {
  return torch::nn::functional::cross_entropy(
      logits.flatten(0, 1),
      windows.slice(/*dim=*/1, /*start=*/1).flatten(),
      torch::nn::functional::CrossEntropyFuncOptions().reduction(std::move(reduction)));
}

}  // namespace

torch::optim::AdamW make_optimizer(ByteLM& model) {
  const auto options = torch::optim::AdamWOptions(kPeakRate).betas({0.9, 0.99}).weight_decay(0.1);
  return torch::optim::AdamW(model->parameters(), options);
}

double train_step(ByteLM& model,
                  torch::optim::AdamW& optimizer,
                  const Text& text,
                  const Settings& settings,
                  int64_t step) {
  // Whatever the step draws comes from here. The factor keeps the steps of two seeds apart.
  torch::manual_seed(settings.seed * 1'000'003 + step);
  const auto windows = text.draw(settings.batch(), settings.context);  // [B, S + 1]

  model->train();
  const auto output = model->forward(windows.slice(/*dim=*/1, 0, settings.context));
  const auto nats = loss(output.logits, windows, torch::kMean);
  optimizer.zero_grad();
  (nats + output.aux_loss).backward();
  torch::nn::utils::clip_grad_norm_(model->parameters(), kLargestGradient);
  for (auto& group : optimizer.param_groups()) {
    group.options().set_lr(learning_rate(step, settings.steps));
  }
  optimizer.step();
  return nats.item<double>() / std::numbers::ln2;
}

Validation validate(ByteLM& model, const at::Tensor& windows, int64_t batch) {
  torch::NoGradGuard no_grad;
  model->eval();
  double nats = 0;
  at::Tensor counts;  // [L, E]
  for (const auto& part : windows.split(batch)) {
    const auto output = model->forward(part.slice(/*dim=*/1, 0, part.size(1) - 1));
    nats += loss(output.logits, part, torch::kSum).item<double>();
    counts = counts.defined() ? counts + output.tokens_per_expert : output.tokens_per_expert;
  }
  const auto bytes = static_cast<double>(windows.size(0) * (windows.size(1) - 1));
  return {nats / bytes / std::numbers::ln2, counts};
}
