#include "reference.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <stdexcept>

namespace torchmoe::reference {

namespace {

// One entry at a time, as double or int64, whatever the type and the strides.
double value(const Tensor& x, std::initializer_list<int64_t> index) {
  Tensor entry = x.detach();
  for (int64_t i : index) {
    entry = entry.select(0, i);
  }
  return entry.item().toDouble();
}

int64_t integer(const Tensor& x, std::initializer_list<int64_t> index) {
  Tensor entry = x;
  for (int64_t i : index) {
    entry = entry.select(0, i);
  }
  return entry.item<int64_t>();
}

bool counts(const OptionalTensor& token_mask, int64_t token) {
  return !token_mask || (*token_mask)[token].item<bool>();
}

// The order of the scores, with NaN after everything.
bool ranks_before(double a, double b) {
  return a > b || (std::isnan(b) && !std::isnan(a));
}

// The words of activations.inc, in addition to those of <cmath>.
constexpr double pi = std::numbers::pi;
double positive(double x) {
  return x > 0 ? x : 0;
}
double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

enum class Kind { plain, gated };

struct Activation {
  const char* name;
  double (*function)(double);
  bool gated;
};

std::vector<Activation> all_activations() {
  using std::erf, std::exp, std::log, std::sqrt, std::tanh;
  std::vector<Activation> all;
#define ACTIVATION(name, kind, formula) \
  all.push_back({ #name, [](double x) -> double { return formula; }, Kind::kind == Kind::gated });
#include "../activations.inc"
#undef ACTIVATION
  return all;
}

Activation find_activation(const std::string& name) {
  for (const auto& activation : all_activations()) {
    if (name == activation.name) {
      return activation;
    }
  }
  throw std::invalid_argument("no activation " + name);
}

}  // namespace

std::vector<std::string> activations() {
  std::vector<std::string> names;
  for (const auto& activation : all_activations()) {
    names.emplace_back(activation.name);
  }
  return names;
}

bool is_gated(const std::string& activation) {
  return find_activation(activation).gated;
}

Tensor router_logits(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  Tensor logits = torch::zeros({x.size(0), weight.size(0)}, torch::kDouble);
  for (int64_t t = 0; t < x.size(0); ++t) {
    for (int64_t e = 0; e < weight.size(0); ++e) {
      double sum = bias ? value(*bias, {e}) : 0;
      for (int64_t h = 0; h < x.size(1); ++h) {
        sum += value(x, {t, h}) * value(weight, {e, h});
      }
      logits[t][e] = sum;
    }
  }
  return logits;
}

Tensor select_experts(const Tensor& scores,
                      int64_t top_k,
                      const OptionalTensor& selection_bias,
                      const OptionalTensor& token_mask) {
  Tensor indices = torch::full({scores.size(0), top_k}, -1, torch::kLong);
  for (int64_t t = 0; t < scores.size(0); ++t) {
    if (!counts(token_mask, t)) {
      continue;
    }
    std::vector<double> score;
    std::vector<int64_t> expert(static_cast<size_t>(scores.size(1)));
    std::iota(expert.begin(), expert.end(), 0);
    for (int64_t e : expert) {
      score.push_back(value(scores, {t, e}) + (selection_bias ? value(*selection_bias, {e}) : 0));
    }
    std::stable_sort(expert.begin(), expert.end(), [&](int64_t a, int64_t b) {
      return ranks_before(score[static_cast<size_t>(a)], score[static_cast<size_t>(b)]);
    });
    for (int64_t j = 0; j < top_k; ++j) {
      indices[t][j] = expert[static_cast<size_t>(j)];
    }
  }
  return indices;
}

Tensor limit_capacity(const Tensor& indices,
                      const std::vector<int64_t>& capacity,
                      const std::string& order,
                      const OptionalTensor& priority,
                      const std::string& overflow,
                      const OptionalTensor& scores,
                      const std::vector<int64_t>& backup) {
  std::vector<std::pair<int64_t, int64_t>> slots;
  for (int64_t t = 0; t < indices.size(0); ++t) {
    for (int64_t j = 0; j < indices.size(1); ++j) {
      slots.emplace_back(t, j);
    }
  }
  if (order == "choice") {
    std::stable_sort(slots.begin(), slots.end(), [](const auto& a, const auto& b) {
      return a.second < b.second;
    });
  }
  if (priority) {
    std::stable_sort(slots.begin(), slots.end(), [&](const auto& a, const auto& b) {
      return ranks_before(value(*priority, {a.first, a.second}),
                          value(*priority, {b.first, b.second}));
    });
  }
  const auto experts = static_cast<int64_t>(capacity.size());
  // What a slot has got, or still asks for.
  Tensor kept = torch::where(indices.ge(0) & indices.lt(experts), indices, -1);
  std::vector<int64_t> room = capacity;
  for (const auto& slot : slots) {
    const int64_t t = slot.first, j = slot.second, e = integer(kept, {t, j});
    if (e < 0) {
      continue;
    }
    std::vector<int64_t> others;
    if (overflow == "backup") {
      others.push_back(backup[static_cast<size_t>(e)]);
    }
    if (overflow != "drop") {
      const Tensor best = select_experts(scores->slice(0, t, t + 1), experts);
      for (int64_t i = 0; i < experts; ++i) {
        others.push_back(integer(best, {0, i}));
      }
    }
    int64_t got = room[static_cast<size_t>(e)] > 0 ? e : -1;
    for (const int64_t other : others) {
      const bool is_named = kept[t].eq(other).any().item<bool>();
      if (got < 0 && room[static_cast<size_t>(other)] > 0 && !is_named) {
        got = other;
      }
    }
    if (got >= 0) {
      --room[static_cast<size_t>(got)];
    }
    kept[t][j] = got;
  }
  return kept;
}

Tensor probabilities(const Tensor& logits, const std::string& score_function) {
  const int64_t experts = logits.size(1);
  Tensor probs = torch::zeros(logits.sizes(), torch::kDouble);
  for (int64_t t = 0; t < logits.size(0); ++t) {
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t e = 0; e < experts; ++e) {
      largest = std::max(largest, value(logits, {t, e}));
    }
    for (int64_t e = 0; e < experts; ++e) {
      sum += std::exp(value(logits, {t, e}) - largest);
    }
    for (int64_t e = 0; e < experts; ++e) {
      const double x = value(logits, {t, e});
      if (score_function == "sigmoid") {
        probs[t][e] = 1 / (1 + std::exp(-x));
      } else if (!std::isinf(largest)) {
        probs[t][e] = std::exp(x - largest) / sum;
      }
    }
  }
  return probs;
}

Tensor gate_weights(const Tensor& logits,
                    const Tensor& indices,
                    const std::string& score_function,
                    const std::string& normalize) {
  const Tensor probs = probabilities(logits, score_function);
  Tensor weights = torch::zeros(indices.sizes(), torch::kDouble);
  for (int64_t t = 0; t < indices.size(0); ++t) {
    std::vector<int64_t> routed;
    double sum = 0;
    for (int64_t j = 0; j < indices.size(1); ++j) {
      const int64_t e = integer(indices, {t, j});
      if (e >= 0 && e < logits.size(1)) {
        routed.push_back(j);
        sum += value(probs, {t, e});
      }
    }
    for (int64_t j : routed) {
      const double p = value(probs, {t, integer(indices, {t, j})});
      weights[t][j] = normalize == "none"      ? p
                      : normalize == "uniform" ? 1.0 / static_cast<double>(routed.size())
                      : sum == 0               ? 0.0
                                               : p / sum;
    }
  }
  return weights;
}

Tensor straight_through_gradient(const Tensor& grad,
                                 const Tensor& logits,
                                 const Tensor& indices,
                                 const std::string& score_function) {
  const int64_t experts = logits.size(1);
  const Tensor probs = probabilities(logits, score_function);
  Tensor result = torch::zeros(logits.sizes(), torch::kDouble);
  for (int64_t t = 0; t < logits.size(0); ++t) {
    std::vector<double> grad_probs(static_cast<size_t>(experts), 0.0);
    double mean = 0;
    for (int64_t j = 0; j < indices.size(1); ++j) {
      const int64_t e = integer(indices, {t, j});
      if (e >= 0 && e < experts) {
        grad_probs[static_cast<size_t>(e)] += value(grad, {t, j});
        mean += value(grad, {t, j}) * value(probs, {t, e});
      }
    }
    for (int64_t e = 0; e < experts; ++e) {
      const double p = value(probs, {t, e}), g = grad_probs[static_cast<size_t>(e)];
      result[t][e] = score_function == "sigmoid" ? g * p * (1 - p) : p * (g - mean);
    }
  }
  return result;
}

DispatchPlan dispatch_plan(const Tensor& indices, int64_t num_experts) {
  const int64_t slots = indices.numel();
  const Tensor flat = indices.reshape({-1});
  DispatchPlan plan{torch::zeros({num_experts + 1}, torch::kLong),
                    torch::empty({slots}, torch::kLong),
                    torch::empty({slots}, torch::kLong)};
  int64_t row = 0;
  const auto place = [&](int64_t slot) {
    plan.row_to_slot[row] = slot;
    plan.slot_to_row[slot] = row;
    ++row;
  };
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      if (integer(flat, {slot}) == e) {
        place(slot);
      }
    }
    plan.expert_offsets[e + 1] = row;
  }
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (integer(flat, {slot}) < 0 || integer(flat, {slot}) >= num_experts) {
      place(slot);
    }
  }
  plan.slot_to_row = plan.slot_to_row.view(indices.sizes());
  return plan;
}

Tensor permute(const Tensor& x, const DispatchPlan& plan) {
  Tensor rows = torch::zeros({plan.row_to_slot.size(0), x.size(1)}, torch::kDouble);
  const int64_t routed = integer(plan.expert_offsets, {plan.expert_offsets.size(0) - 1});
  for (int64_t r = 0; r < routed; ++r) {
    rows[r] = x[integer(plan.row_to_slot, {r}) / plan.slot_to_row.size(1)].to(torch::kDouble);
  }
  return rows;
}

Tensor unpermute(const Tensor& rows, const Tensor& weights, const DispatchPlan& plan) {
  Tensor y = torch::zeros({plan.slot_to_row.size(0), rows.size(1)}, torch::kDouble);
  const int64_t routed = integer(plan.expert_offsets, {plan.expert_offsets.size(0) - 1});
  for (int64_t t = 0; t < plan.slot_to_row.size(0); ++t) {
    for (int64_t j = 0; j < plan.slot_to_row.size(1); ++j) {
      const int64_t r = integer(plan.slot_to_row, {t, j});
      if (r < routed) {
        y[t] += value(weights, {t, j}) * rows[r].to(torch::kDouble);
      }
    }
  }
  return y;
}

Tensor grouped_linear(const Tensor& rows,
                      const Tensor& weight,
                      const OptionalTensor& bias,
                      const Tensor& expert_offsets) {
  Tensor out = torch::zeros({rows.size(0), weight.size(1)}, torch::kDouble);
  for (int64_t e = 0; e < weight.size(0); ++e) {
    const int64_t begin = integer(expert_offsets, {e}), end = integer(expert_offsets, {e + 1});
    out.slice(0, begin, end) = router_logits(
        rows.slice(0, begin, end), weight[e], bias ? OptionalTensor((*bias)[e]) : OptionalTensor());
  }
  return out;
}

Tensor sum_by_expert(const Tensor& rows, const Tensor& expert_offsets) {
  const int64_t num_experts = expert_offsets.size(0) - 1;
  Tensor sums = torch::zeros({num_experts, rows.size(1)}, torch::kDouble);
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t r = integer(expert_offsets, {e}); r < integer(expert_offsets, {e + 1}); ++r) {
      sums[e] += rows[r].to(torch::kDouble);
    }
  }
  return sums;
}

Tensor expert_mlp(const Tensor& x,
                  const Tensor& indices,
                  const Tensor& weights,
                  const Tensor& w_in,
                  const OptionalTensor& b_in,
                  const Tensor& w_out,
                  const OptionalTensor& b_out,
                  const std::string& activation) {
  const Activation act = find_activation(activation);
  const int64_t inner = w_out.size(2);
  const auto of_expert = [](const OptionalTensor& bias, int64_t e) {
    return bias ? OptionalTensor((*bias)[e]) : OptionalTensor();
  };
  Tensor y = torch::zeros(x.sizes(), torch::kDouble);
  for (int64_t t = 0; t < x.size(0); ++t) {
    for (int64_t j = 0; j < indices.size(1); ++j) {
      const int64_t e = integer(indices, {t, j});
      if (e < 0 || e >= w_in.size(0)) {
        continue;
      }
      const Tensor pre = router_logits(x[t].unsqueeze(0), w_in[e], of_expert(b_in, e));
      Tensor hidden = torch::zeros({1, inner}, torch::kDouble);
      for (int64_t i = 0; i < inner; ++i) {
        hidden[0][i] =
            act.function(value(pre, {0, i})) * (act.gated ? value(pre, {0, inner + i}) : 1);
      }
      y[t] += value(weights, {t, j}) * router_logits(hidden, w_out[e], of_expert(b_out, e))[0];
    }
  }
  return y;
}

double load_balancing_loss(const Tensor& logits,
                           const Tensor& fraction,
                           const std::string& score_function,
                           const OptionalTensor& token_mask) {
  const int64_t experts = logits.size(1);
  const Tensor probs = probabilities(logits, score_function);
  double loss = 0;
  int64_t counted = 0;
  for (int64_t t = 0; t < logits.size(0); ++t) {
    if (!counts(token_mask, t)) {
      continue;
    }
    ++counted;
    double sum = 0;
    for (int64_t e = 0; e < experts; ++e) {
      sum += value(probs, {t, e});
    }
    for (int64_t e = 0; e < experts && sum != 0; ++e) {
      loss += value(fraction, {e}) * value(probs, {t, e}) / sum;
    }
  }
  return counted == 0 ? 0 : static_cast<double>(experts) * loss / static_cast<double>(counted);
}

Tensor mean_over_tokens(const Tensor& values, const OptionalTensor& token_mask) {
  Tensor mean = torch::zeros({values.size(1)}, torch::kDouble);
  for (int64_t c = 0; c < values.size(1); ++c) {
    double sum = 0;
    int64_t counted = 0;
    for (int64_t t = 0; t < values.size(0); ++t) {
      if (counts(token_mask, t)) {
        ++counted;
        sum += value(values, {t, c});
      }
    }
    mean[c] = counted == 0 ? 0 : sum / static_cast<double>(counted);
  }
  return mean;
}

double router_z_loss(const Tensor& logits, const OptionalTensor& token_mask) {
  double sum = 0;
  int64_t counted = 0;
  for (int64_t t = 0; t < logits.size(0); ++t) {
    if (!counts(token_mask, t)) {
      continue;
    }
    ++counted;
    double exponentials = 0;
    for (int64_t e = 0; e < logits.size(1); ++e) {
      exponentials += std::exp(value(logits, {t, e}));
    }
    sum += std::pow(std::log(exponentials), 2);
  }
  return counted == 0 ? 0 : sum / static_cast<double>(counted);
}

}  // namespace torchmoe::reference
