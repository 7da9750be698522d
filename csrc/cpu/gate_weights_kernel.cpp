#include <algorithm>
#include <vector>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "common/vocabulary.h"
#include "cpu/parallel.h"
#include "cpu/score.h"
#include "ops/gate_weights.h"

namespace torchmoe {

namespace {

constexpr auto kOp = "gate_weights";

/// A token's routed slots: their numbers and experts, in slot order.
struct RoutedSlots {
  std::vector<int64_t> slots;
  std::vector<int64_t> experts;

  void read(const int64_t* indices, int64_t top_k, int64_t num_experts) {
    slots.clear();
    experts.clear();
    for (int64_t j = 0; j < top_k; ++j) {
      if (indices[j] >= 0 && indices[j] < num_experts) {
        slots.push_back(j);
        experts.push_back(indices[j]);
      }
    }
  }
  int64_t size() const { return static_cast<int64_t>(slots.size()); }
};

/// The formulas for one token, with the scratch they need.
template <typename T>
class Gate {
 public:
  Gate(ScoreFunction score_function, Normalize normalize, int64_t num_experts, int64_t top_k)
      : score_function_(score_function),
        normalize_(normalize),
        num_experts_(num_experts),
        top_k_(top_k),
        probs_(num_experts),
        grad_probs_(num_experts),
        slot_values_(top_k) {}

  void forward(const T* logits, const int64_t* indices, T* weights) {
    routed_.read(indices, top_k_, num_experts_);
    std::fill(weights, weights + top_k_, T(0));
    slot_weights(logits);
    for (int64_t i = 0; i < routed_.size(); ++i) {
      weights[routed_.slots[i]] = slot_values_[i];
    }
  }

  /// grad_logits starts as zeros, which is all that a token without a routed slot gets, whatever
  /// its logits are.
  void backward(const T* grad, const T* logits, const int64_t* indices, T* grad_logits) {
    routed_.read(indices, top_k_, num_experts_);
    if (routed_.size() == 0 || normalize_ == Normalize::uniform) {
      return;
    }
    if (normalize_ == Normalize::topk) {
      normalized_backward(grad, logits, grad_logits);
      return;
    }
    std::fill(grad_probs_.begin(), grad_probs_.end(), T(0));
    for (int64_t i = 0; i < routed_.size(); ++i) {
      grad_probs_[routed_.experts[i]] += grad[routed_.slots[i]];
    }
    cpu::score_row(score_function_, logits, num_experts_, probs_.data());
    cpu::score_row_backward(
        score_function_, probs_.data(), grad_probs_.data(), num_experts_, grad_logits);
  }

 private:
  /// The weights of the routed slots, in slot_values_.
  void slot_weights(const T* logits) {
    const int64_t count = routed_.size();
    if (normalize_ == Normalize::uniform) {
      std::fill_n(slot_values_.begin(), count, T(1) / static_cast<T>(count));
      return;
    }
    if (normalize_ == Normalize::topk) {
      for (int64_t i = 0; i < count; ++i) {
        slot_values_[i] = logits[routed_.experts[i]];
      }
      cpu::relative_scores(score_function_, count, slot_values_.data(), slot_values_.data());
      if (score_function_ == ScoreFunction::sigmoid) {
        cpu::divide_by_sum(count, slot_values_.data());
      }
      return;
    }
    cpu::score_row(score_function_, logits, num_experts_, probs_.data());
    for (int64_t i = 0; i < count; ++i) {
      slot_values_[i] = probs_[routed_.experts[i]];
    }
  }

  /// w_j = q_j / sum_l q_l over the routed slots, q being exp(logit) or the sigmoid: dL/dlog q_j =
  /// w_j (g_j - sum_l w_l g_l), and d log q / d logit is 1 for softmax, 1 - p for sigmoid.
  void normalized_backward(const T* grad, const T* logits, T* grad_logits) {
    slot_weights(logits);
    T mean = 0;
    for (int64_t i = 0; i < routed_.size(); ++i) {
      mean += slot_values_[i] * grad[routed_.slots[i]];
    }
    for (int64_t i = 0; i < routed_.size(); ++i) {
      const int64_t e = routed_.experts[i];
      const T slope = cpu::log_slope(score_function_, logits[e]);
      grad_logits[e] += slot_values_[i] * (grad[routed_.slots[i]] - mean) * slope;
    }
  }

  ScoreFunction score_function_;
  Normalize normalize_;
  int64_t num_experts_;
  int64_t top_k_;
  RoutedSlots routed_;
  std::vector<T> probs_;
  std::vector<T> grad_probs_;
  std::vector<T> slot_values_;
};

at::Tensor gate_weights_kernel(const at::Tensor& logits,
                               const at::Tensor& indices,
                               std::string_view score_function,
                               std::string_view normalize,
                               std::string_view estimator) {
  check_gate_weights(logits, indices, score_function, normalize, estimator);
  const auto acc = accumulate_dtype(logits.scalar_type());
  const auto logits_acc = contiguous_as(logits, acc);
  const auto indices_c = indices.contiguous();
  const int64_t num_experts = logits.size(1);
  const int64_t top_k = indices.size(1);
  auto weights = at::empty(indices.sizes(), logits.options().dtype(acc));
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    const auto* z = logits_acc.const_data_ptr<scalar_t>();
    const auto* ids = indices_c.const_data_ptr<int64_t>();
    auto* w = weights.mutable_data_ptr<scalar_t>();
    cpu::parallel_items(indices.size(0), num_experts, [&](int64_t begin, int64_t end) {
      Gate<scalar_t> gate(choose<ScoreFunction>(kOp, score_function),
                          choose<Normalize>(kOp, normalize),
                          num_experts,
                          top_k);
      for (int64_t t = begin; t < end; ++t) {
        gate.forward(z + t * num_experts, ids + t * top_k, w + t * top_k);
      }
    });
  });
  return weights;
}

at::Tensor gate_weights_backward_kernel(const at::Tensor& grad,
                                        const at::Tensor& logits,
                                        const at::Tensor& indices,
                                        std::string_view score_function,
                                        std::string_view normalize,
                                        std::string_view estimator) {
  check_gate_weights_backward(grad, logits, indices, score_function, normalize, estimator);
  // Straight through, the normalisation counts as the identity: the gradient of normalize "none".
  const auto backward_normalize =
      choose<GateEstimator>(kOp, estimator) == GateEstimator::straight_through
          ? Normalize::none
          : choose<Normalize>(kOp, normalize);
  const auto acc = accumulate_dtype(logits.scalar_type());
  const auto grad_acc = contiguous_as(grad, acc);
  const auto logits_acc = contiguous_as(logits, acc);
  const auto indices_c = indices.contiguous();
  const int64_t num_experts = logits.size(1);
  const int64_t top_k = indices.size(1);
  auto grad_logits = at::empty(logits.sizes(), logits.options().dtype(acc));
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    const auto* g = grad_acc.const_data_ptr<scalar_t>();
    const auto* z = logits_acc.const_data_ptr<scalar_t>();
    const auto* ids = indices_c.const_data_ptr<int64_t>();
    auto* grad_z = grad_logits.mutable_data_ptr<scalar_t>();
    cpu::parallel_items(indices.size(0), num_experts, [&](int64_t begin, int64_t end) {
      Gate<scalar_t> gate(
          choose<ScoreFunction>(kOp, score_function), backward_normalize, num_experts, top_k);
      std::fill(grad_z + begin * num_experts, grad_z + end * num_experts, scalar_t(0));
      for (int64_t t = begin; t < end; ++t) {
        gate.backward(
            g + t * top_k, z + t * num_experts, ids + t * top_k, grad_z + t * num_experts);
      }
    });
  });
  return grad_logits.to(logits.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("gate_weights", &gate_weights_kernel);
  m.impl("_gate_weights_backward", &gate_weights_backward_kernel);
}

}  // namespace torchmoe
