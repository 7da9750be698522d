#include <optional>

#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "common/vocabulary.h"
#include "cpu/score.h"
#include "cpu/token_blocks.h"
#include "ops/load_balancing_loss.h"

namespace torchmoe {

namespace {

/// A token's q = p / sum p, 0 where all of p is. Dividing takes out of the softmax what its sum errs
/// by.
template <typename T>
void shares_of_token(ScoreFunction score_function,
                     const T* logits,
                     int64_t num_experts,
                     T* shares) {
  cpu::relative_scores(score_function, num_experts, logits, shares);
  cpu::divide_by_sum(num_experts, shares);
}

/// E * sum_i fraction_i * P_i of one sequence; nothing where no token counts.
template <typename T>
std::optional<double> sequence_loss(ScoreFunction score_function,
                                    const T* logits,
                                    const T* fraction,
                                    const bool* token_mask,
                                    int64_t num_tokens,
                                    int64_t num_experts) {
  const auto shares = cpu::sum_over_tokens<T>(
      num_tokens, token_mask, num_experts, [&](int64_t t, double* sums, T* of_token) {
        shares_of_token(score_function, logits + t * num_experts, num_experts, of_token);
        for (int64_t e = 0; e < num_experts; ++e) {
          sums[e] += static_cast<double>(of_token[e]);
        }
      });
  if (shares.count == 0) {
    return std::nullopt;
  }
  double loss = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    loss += static_cast<double>(fraction[e]) * shares.sums[e];
  }
  return loss * static_cast<double>(num_experts) / static_cast<double>(shares.count);
}

/// grad_logits of one sequence. With q = p / sum p the loss is scale * sum_t <fraction, q_t>, and
/// d<f, q>/dlogit_i = q_i (f_i - <f, q>), times 1 - p_i for a sigmoid. In this form nothing is
/// divided by a small sum of p.
template <typename T>
void sequence_loss_backward(ScoreFunction score_function,
                            T scale,
                            const T* logits,
                            const T* fraction,
                            const bool* token_mask,
                            int64_t num_tokens,
                            int64_t num_experts,
                            T* grad_logits) {
  cpu::parallel_items(num_tokens, num_experts, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* row = logits + t * num_experts;
      T* out = grad_logits + t * num_experts;
      if (token_mask != nullptr && !token_mask[t]) {
        std::fill(out, out + num_experts, T(0));
        continue;
      }
      shares_of_token(score_function, row, num_experts, out);
      T mean = 0;
      for (int64_t e = 0; e < num_experts; ++e) {
        mean += fraction[e] * out[e];
      }
      for (int64_t e = 0; e < num_experts; ++e) {
        out[e] *= scale * (fraction[e] - mean) * cpu::log_slope(score_function, row[e]);
      }
    }
  });
}

at::Tensor load_balancing_loss_kernel(const at::Tensor& logits,
                                      const at::Tensor& fraction,
                                      std::string_view score_function,
                                      const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss(logits, fraction, score_function, token_mask);
  const auto acc = accumulate_dtype(logits.scalar_type());
  const auto logits_acc = contiguous_as(logits, acc);
  const auto fraction_acc = contiguous_as(fraction, acc);
  const auto mask = contiguous_as(token_mask, at::kBool);
  const int64_t num_experts = logits.size(-1);
  const int64_t num_tokens = logits.size(-2);
  const int64_t num_sequences = c10::multiply_integers(logits.sizes().slice(0, logits.dim() - 2));
  auto loss = at::empty({}, logits.options().dtype(acc));
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    const bool* mask_data = data_or_null<bool>(mask);
    double sum = 0;
    int64_t counted = 0;
    for (int64_t s = 0; s < num_sequences; ++s) {
      const auto of_sequence =
          sequence_loss(choose<ScoreFunction>("load_balancing_loss", score_function),
                        logits_acc.const_data_ptr<scalar_t>() + s * num_tokens * num_experts,
                        fraction_acc.const_data_ptr<scalar_t>() + s * num_experts,
                        mask_data == nullptr ? nullptr : mask_data + s * num_tokens,
                        num_tokens,
                        num_experts);
      sum += of_sequence.value_or(0.0);
      counted += of_sequence ? 1 : 0;
    }
    *loss.mutable_data_ptr<scalar_t>() =
        static_cast<scalar_t>(counted == 0 ? 0.0 : sum / static_cast<double>(counted));
  });
  return loss;
}

at::Tensor load_balancing_loss_backward_kernel(const at::Tensor& grad,
                                               const at::Tensor& logits,
                                               const at::Tensor& fraction,
                                               std::string_view score_function,
                                               const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss_backward(grad, logits, fraction, score_function, token_mask);
  const auto acc = accumulate_dtype(logits.scalar_type());
  const auto grad_acc = grad.to(acc);
  const auto logits_acc = contiguous_as(logits, acc);
  const auto fraction_acc = contiguous_as(fraction, acc);
  const auto mask = contiguous_as(token_mask, at::kBool);
  const int64_t num_experts = logits.size(-1);
  const int64_t num_tokens = logits.size(-2);
  const int64_t num_sequences = c10::multiply_integers(logits.sizes().slice(0, logits.dim() - 2));
  auto grad_logits = at::empty(logits.sizes(), logits.options().dtype(acc));
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    const bool* mask_data = data_or_null<bool>(mask);
    const auto mask_of = [&](int64_t s) {
      return mask_data == nullptr ? nullptr : mask_data + s * num_tokens;
    };
    int64_t counted = 0;
    for (int64_t s = 0; s < num_sequences; ++s) {
      counted += cpu::count_tokens(num_tokens, mask_of(s)) > 0 ? 1 : 0;
    }
    for (int64_t s = 0; s < num_sequences; ++s) {
      const bool* sequence_mask = mask_of(s);
      const auto count = static_cast<double>(cpu::count_tokens(num_tokens, sequence_mask));
      const double scale = static_cast<double>(*grad_acc.const_data_ptr<scalar_t>()) *
                           static_cast<double>(num_experts) /
                           (count * static_cast<double>(counted));
      sequence_loss_backward(
          choose<ScoreFunction>("load_balancing_loss", score_function),
          static_cast<scalar_t>(scale),
          logits_acc.const_data_ptr<scalar_t>() + s * num_tokens * num_experts,
          fraction_acc.const_data_ptr<scalar_t>() + s * num_experts,
          sequence_mask,
          num_tokens,
          num_experts,
          grad_logits.mutable_data_ptr<scalar_t>() + s * num_tokens * num_experts);
    }
  });
  return grad_logits.to(logits.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("load_balancing_loss", &load_balancing_loss_kernel);
  m.impl("_load_balancing_loss_backward", &load_balancing_loss_backward_kernel);
}

}  // namespace torchmoe
