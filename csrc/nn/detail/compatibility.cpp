#include "nn/detail/compatibility.h"

#include <functional>
#include <sstream>
#include <typeinfo>

#include "common/vocabulary.h"
#include "nn/detail/checks.h"

namespace torchmoe::nn {
namespace {

/// The parts of one layer, with settings that it may have or get.
struct Parts {
  const MoEImpl& layer;
  const Balance& balance;
  const std::optional<Capacity>& capacity;

  bool has_assistance() const { return !layer.assistance.is_empty(); }
  std::vector<std::string> readers() const {
    return usage_readers(balance, capacity, has_assistance());
  }
  size_t backup_entries() const { return capacity ? capacity->backup().size() : 0; }
  int64_t num_experts() const { return layer.options().num_experts(); }
  int64_t sure_experts() const { return least_experts(layer.estimator()); }
  double most_load() const {
    return static_cast<double>(num_experts()) / static_cast<double>(sure_experts());
  }
  bool wants_bias() const { return balance.selection_bias_rate() > 0; }
};

/// Two parts that are not compatible under a condition.
struct Pair {
  const char* argument;  // the one of the two that messages name
  std::function<bool(const Parts&)> clashes;
  std::function<std::string(const Parts&)> requirement;  // what must hold instead, and why
  std::function<std::string(const Parts&)> got;
};

template <typename... Pieces>
std::string text(const Pieces&... pieces) {
  std::ostringstream stream;
  (stream << ... << pieces);
  return stream.str();
}

std::string rate(const Parts& p) {
  return shown(p.balance.selection_bias_rate());
}

std::string assistance(const Parts& p) {
  return text(p.layer.assistance->settings());
}

const std::vector<Pair>& pairs() {
  static const std::vector<Pair> pairs{
      // --- the router's usage, and whatever reads it
      {"router",
       [](const Parts& p) { return !p.readers().empty() && !usage_of(p.layer.router()).defined(); },
       [](const Parts& p) {
         return text("keep usage for ", p.readers()[0], ", as Router(track_usage=True) does");
       },
       [](const Parts& p) {
         const auto module = p.layer.router().module();
         return (module ? class_name(typeid(*module)) : "a function") + " without";
       }},
      // --- the estimator, and what it has no formula for
      {"balance.selection_bias_rate",
       [](const Parts& p) {
         return p.wants_bias() && !p.layer.estimator().traits().takes_selection_bias;
       },
       [](const Parts& p) {
         const auto& estimator = p.layer.estimator();
         return text("be 0 for the estimator ",
                     class_name(typeid(estimator)),
                     ", ",
                     estimator.traits().refusal);
       },
       rate},
      {"balance.selection_bias_rate",
       [](const Parts& p) { return p.wants_bias() && !p.layer.selection_bias.defined(); },
       [](const Parts&) {
         return std::string("stay 0 in a layer that was made without a selection bias");
       },
       rate},
      // --- capacity and assistance, and the number of experts
      {"capacity.backup",
       [](const Parts& p) {
         const auto entries = p.backup_entries();
         return entries != 0 && entries != static_cast<size_t>(p.num_experts());
       },
       [](const Parts& p) {
         return text("have ", p.num_experts(), " entries, one for each expert");
       },
       [](const Parts& p) { return text(p.backup_entries()); }},
      {"assistance",
       [](const Parts& p) { return p.has_assistance() && p.sure_experts() == p.num_experts(); },
       [](const Parts& p) {
         return text("be None with top_k ",
                     p.num_experts(),
                     ", where every token has every expert already");
       },
       assistance},
      {"assistance.threshold",
       [](const Parts& p) {
         return p.has_assistance() && p.layer.assistance->threshold() >= p.most_load();
       },
       [](const Parts& p) {
         return text("be below num_experts / top_k = ",
                     shown(p.most_load()),
                     ", the load of an expert that every token chooses");
       },
       [](const Parts& p) { return shown(p.layer.assistance->threshold()); }},
      {"gate.normalize",
       [](const Parts& p) {
         const auto& estimator = p.layer.estimator();
         return p.has_assistance() && estimator.top_k() == 1 &&
                choose<Normalize>("Gate", estimator.normalize()) == Normalize::topk &&
                estimator.has_constant_weights(1);
       },
       [](const Parts&) {
         return std::string(
             "be \"none\" for top_k 1 with assistance, without which the weights are constant and "
             "the router learns nothing");
       },
       [](const Parts& p) { return text('"', p.layer.estimator().normalize(), '"'); }},
  };
  return pairs;
}

}  // namespace

at::Tensor usage_of(const TokenFunction& router) {
  const auto* tracking = router.as<UsageTracking>();
  return tracking != nullptr ? tracking->usage : at::Tensor();
}

std::vector<std::string> usage_readers(const Balance& balance,
                                       const std::optional<Capacity>& capacity,
                                       bool has_assistance) {
  std::vector<std::string> readers;
  if (capacity && capacity->dynamic()) {
    readers.emplace_back("a dynamic capacity");
  }
  if (has_assistance) {
    readers.emplace_back("assistance");
  }
  if (choose<FractionFrom>("Balance", balance.fraction_from()) == FractionFrom::history) {
    readers.emplace_back("balance.fraction_from \"history\"");
  }
  return readers;
}

std::string update_reader(const MoEImpl& layer) {
  const auto& options = layer.options();
  const auto readers =
      usage_readers(options.balance(), options.capacity(), !layer.assistance.is_empty());
  if (!readers.empty()) {
    return readers[0];
  }
  if (layer.selection_bias.defined()) {
    return "a selection bias";
  }
  const auto* tracking = layer.router().as<UsageTracking>();
  return tracking != nullptr && tracking->usage_scaling() ? "usage_scaling" : "";
}

int64_t least_experts(const Estimator& estimator) {
  return estimator.traits().fills_slots ? estimator.top_k() : 1;
}

void check_pairs(const MoEImpl& layer,
                 const Balance& balance,
                 const std::optional<Capacity>& capacity) {
  const Parts parts{layer, balance, capacity};
  for (const auto& pair : pairs()) {
    TORCH_CHECK_VALUE(!pair.clashes(parts),
                      "MoE: ",
                      pair.argument,
                      " must ",
                      pair.requirement(parts),
                      ", got ",
                      pair.got(parts));
  }
}

}  // namespace torchmoe::nn
