// The same bits for every number of threads, forward and backward, in every op.
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iterator>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>

#include "support.h"
#include "torchmoe.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::DispatchPlan;

namespace {

// Large enough for several tasks each, and no multiple of a vector or a block.
constexpr int64_t kTokens = 1031, kHidden = 37, kInner = 29, kExperts = 7, kTopK = 3;

using Named = std::vector<std::pair<std::string, Tensor>>;

Named all_ops(at::ScalarType dtype) {
  Named results;
  // Keeps outputs and the gradients of `inputs` for a fixed weighting of the output.
  const auto keep = [&](const std::string& name, const Tensor& y, const Tensors& inputs) {
    results.emplace_back(name, y.detach());
    const Tensor weighting = wave(y.sizes(), 3, 1, y.scalar_type());
    const auto grads = torch::autograd::grad({y}, inputs, {weighting}, /*retain_graph=*/true);
    for (size_t i = 0; i < grads.size(); ++i) {
      results.emplace_back(name + " gradient " + std::to_string(i), grads[i]);
    }
  };
  const auto variable = [&](at::IntArrayRef sizes, double phase) {
    return wave(sizes, phase, 1, dtype).requires_grad_();
  };

  const Tensor x = variable({kTokens, kHidden}, 0), router = variable({kExperts, kHidden}, 1);
  const Tensor router_bias = variable({kExperts}, 2);
  const Tensor computed = torchmoe::router_logits(x, router, router_bias);
  keep("router_logits", computed, {x, router, router_bias});

  const Tensor logits = computed.detach().requires_grad_();
  const Tensor selected = torchmoe::select_experts(logits, kTopK);
  results.emplace_back("select_experts", selected);
  const Tensor capacity = torch::full({kExperts}, 400, torch::kLong);
  for (const std::string order : {"choice", "token"}) {
    results.emplace_back("limit_capacity " + order,
                         torchmoe::limit_capacity(selected, capacity, order));
    results.emplace_back(
        "limit_capacity by priority " + order,
        torchmoe::limit_capacity(selected, capacity, order, wave(selected.sizes(), 1)));
  }
  const Tensor backup = torch::arange(kExperts).add(1).remainder(kExperts);
  results.emplace_back(
      "limit_capacity with next_best",
      torchmoe::limit_capacity(selected, capacity, "token", {}, "next_best", logits.detach()));
  results.emplace_back("limit_capacity with backup",
                       torchmoe::limit_capacity(
                           selected, capacity, "choice", {}, "backup", logits.detach(), backup));
  const Tensor indices = torchmoe::limit_capacity(selected, capacity);
  for (const std::string normalize : {"none", "topk"}) {
    for (const std::string score : {"softmax", "sigmoid"}) {
      const auto weights = torchmoe::gate_weights(logits, selected, score, normalize, "exact");
      keep("gate_weights " + score + " " + normalize, weights, {logits});
    }
  }
  const DispatchPlan plan = torchmoe::dispatch_plan(indices, kExperts);
  results.emplace_back("dispatch_plan offsets", plan.expert_offsets);
  results.emplace_back("dispatch_plan row_to_slot", plan.row_to_slot);
  results.emplace_back("dispatch_plan slot_to_row", plan.slot_to_row);

  keep("permute", torchmoe::permute(x, plan), {x});
  const Tensor rows = variable({kTokens * kTopK, kHidden}, 4);
  const auto weight_type = dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  const Tensor weights = wave({kTokens, kTopK}, 5, 1, weight_type).requires_grad_();
  keep("unpermute", torchmoe::unpermute(rows, weights, plan), {rows, weights});

  const Tensor w = variable({kExperts, kInner, kHidden}, 6), b = variable({kExperts, kInner}, 7);
  keep("grouped_linear", torchmoe::grouped_linear(rows, w, b, plan.expert_offsets), {rows, w, b});
  keep("sum_by_expert", torchmoe::sum_by_expert(rows, plan.expert_offsets), {rows});
  const Tensor w_out = variable({kExperts, kHidden, kInner}, 8),
               b_out = variable({kExperts, kHidden}, 9);
  keep("expert_mlp gelu",
       torchmoe::expert_mlp(x, indices, weights, {w, b, w_out, b_out}, "gelu"),
       {x, weights, w, b, w_out, b_out});
  const Tensor w_gated = variable({kExperts, 2 * kInner, kHidden}, 10);
  keep("expert_mlp swiglu",
       torchmoe::expert_mlp(x, indices, weights, {w_gated, {}, w_out, {}}, "swiglu"),
       {x, weights, w_gated, w_out});

  const Tensor y = variable({kTokens, kHidden}, 14);
  const Tensor probs = leaf({kTokens, kExperts}, 15);
  keep("attach_dense_gradient",
       torchmoe::attach_dense_gradient(y, probs, x, {w_gated, {}, w_out, b_out}, "swiglu"),
       {y, probs});

  const Tensor fraction = wave({kExperts}, 11).abs(), mask = wave({kTokens}, 12).gt(-0.5);
  for (const std::string score : {"softmax", "sigmoid"}) {
    keep("load_balancing_loss " + score,
         torchmoe::load_balancing_loss(logits, fraction, score, mask),
         {logits});
  }
  keep("mean_over_tokens", torchmoe::mean_over_tokens(logits, mask), {logits});
  keep("router_z_loss", torchmoe::router_z_loss(logits, mask), {logits});
  keep("scale_gradient", torchmoe::scale_gradient(x, wave({kTokens, 1}, 13)), {x});
  const Tensor loss = leaf({});
  keep("attach_loss", torchmoe::attach_loss(x, loss), {x, loss});
  return results;
}

int threads_of_this_process() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<int>(std::distance(begin(tasks), end(tasks)));
}

// How many threads `call` starts. OpenMP keeps a pool for each thread that enters a parallel
// region, so that a fresh thread shows what the call itself asks for.
template <typename Call>
int threads_started_by(const Call& call) {
  const int idle = threads_of_this_process();
  int started = 0;
  std::thread([&] {
    at::set_num_threads(2);
    const int before = threads_of_this_process();
    call();
    started = threads_of_this_process() - before;
  }).join();
  // The pool ends after its owner; a thread of it that still lives would be counted into the next
  // call's `before`.
  for (int wait = 0; wait < 5000 && threads_of_this_process() > idle; ++wait) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return started;
}

class RestoreThreads {
 public:
  RestoreThreads() = default;
  RestoreThreads(const RestoreThreads&) = delete;
  RestoreThreads& operator=(const RestoreThreads&) = delete;
  ~RestoreThreads() { at::set_num_threads(threads_); }

 private:
  int threads_ = at::get_num_threads();
};

}  // namespace

TEST_CASE("every op gives the same bits for any number of threads", "[determinism]") {
  const RestoreThreads restore;
  for (const auto dtype : {torch::kFloat32, torch::kFloat64, torch::kBFloat16}) {
    at::set_num_threads(1);
    const Named expected = all_ops(dtype);
    for (const int threads : {1, 2, 4, 8}) {
      at::set_num_threads(threads);
      const Named actual = all_ops(dtype);
      REQUIRE(actual.size() == expected.size());
      for (size_t i = 0; i < expected.size(); ++i) {
        INFO(expected[i].first << " " << dtype << " with " << threads << " threads");
        CHECK(torch::equal(actual[i].second, expected[i].second));
      }
    }
  }
}

TEST_CASE("the library's parallel regions use the threads they may", "[determinism]") {
  const at::NoGradGuard no_grad;
  const Tensor scores = wave({20000, 16}), x = wave({20000, 64});
  const Tensor indices = torchmoe::select_experts(scores, 2);
  const DispatchPlan plan = torchmoe::dispatch_plan(indices, 16);
  CHECK(threads_started_by([] {}) == 0);
  CHECK(threads_started_by([&] { torchmoe::select_experts(scores, 2); }) == 1);
  CHECK(threads_started_by(
            [&] { torchmoe::gate_weights(scores, indices, "softmax", "topk", "exact"); }) == 1);
  CHECK(threads_started_by([&] { torchmoe::permute(x, plan); }) == 1);
  CHECK(threads_started_by([&] { torchmoe::mean_over_tokens(x); }) == 1);
  CHECK(threads_started_by([&] { torchmoe::router_logits(x, x.slice(0, 0, 16)); }) == 1);
}

TEST_CASE("work that is too small to share starts no thread", "[determinism]") {
  // A process that was forked from one with threads has none, and would wait for them for ever.
  for (const int64_t tokens : {0, 1, 20}) {
    INFO(tokens << " tokens");
    const Tensor x = wave({tokens, 8}).set_requires_grad(true);
    const Tensor weight = wave({4, 8}, 1);
    const Tensor w_in = wave({4, 12, 8}, 2), w_out = wave({4, 8, 6}, 3);
    CHECK(threads_started_by([&] {
            const Tensor logits = torchmoe::router_logits(x, weight);
            const Tensor indices = torchmoe::select_experts(logits.detach(), 2);
            const Tensor weights =
                torchmoe::gate_weights(logits, indices, "softmax", "topk", "exact");
            const Tensor y =
                torchmoe::expert_mlp(x, indices, weights, {w_in, {}, w_out, {}}, "swiglu");
            const Tensor dense =
                torchmoe::attach_dense_gradient(y, logits, x, {w_in, {}, w_out, {}}, "swiglu");
            const auto plan = torchmoe::dispatch_plan(indices, 4);
            const Tensor rows =
                torchmoe::grouped_linear(torchmoe::permute(x, plan), w_in, {}, plan.expert_offsets);
            const Tensor fraction = torch::full({4}, 0.25, torch::kFloat64);
            (dense.sum() + rows.sum() + torchmoe::router_z_loss(logits) +
             torchmoe::mean_over_tokens(logits).sum() +
             torchmoe::load_balancing_loss(logits, fraction, "softmax"))
                .backward();
          }) == 0);
  }
}
