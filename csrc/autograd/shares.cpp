#include "autograd/shares.h"

#include <limits>

#include <ATen/TensorOperators.h>
#include <ATen/ops/all.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>

namespace torchmoe {

namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

/// log(1 / (1 + exp(-logit))), on either side of 0 by exponentials of nothing positive, whose
/// derivatives of any order are finite. At -inf the logarithm is a constant.
at::Tensor log_of_sigmoid(const at::Tensor& logits) {
  const auto nowhere = logits == kMinusInfinity;
  const auto right = logits >= 0;
  const auto x = at::where(right, logits, 0.0);
  const auto v = at::where(at::logical_or(right, nowhere), 0.0, logits);
  const auto log = at::where(right, -at::log1p(at::exp(-x)), v - at::log1p(at::exp(v)));
  return at::where(nowhere, kMinusInfinity, log);
}

/// The softmax, 0 where every element is -inf; torch's has NaN there, also in its derivatives.
at::Tensor softmax(const at::Tensor& numbers) {
  const auto nothing = at::all(numbers == kMinusInfinity, -1, /*keepdim=*/true);
  return at::where(nothing, 0.0, at::softmax(at::where(nothing, 0.0, numbers), -1));
}

}  // namespace

at::Tensor scores_of(const at::Tensor& logits, ScoreFunction score_function) {
  switch (score_function) {
    case ScoreFunction::softmax:
      return softmax(logits);
    case ScoreFunction::sigmoid:
      return at::sigmoid(logits);
  }
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor shares_of(const at::Tensor& logits,
                     ScoreFunction score_function,
                     const std::optional<at::Tensor>& counts) {
  const auto log = [&] {
    switch (score_function) {
      case ScoreFunction::softmax:
        return logits;
      case ScoreFunction::sigmoid:
        return log_of_sigmoid(logits);
    }
    TORCH_INTERNAL_ASSERT(false);
  }();
  return softmax(counts ? at::where(*counts, log, kMinusInfinity) : log);
}

}  // namespace torchmoe
