// A mixture of experts in C++: LibTorch and torchmoe, no Python.
//
// The function to learn obeys another law in each quadrant of the plane. Nobody tells the layer:
// the router finds the quadrants, the experts divide them among themselves. Build and run it with
//
//   torch=$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')
//   torchmoe=$(python -c 'import torchmoe; print(torchmoe.cmake_prefix_path)')
//   cmake -S examples/cpp -B build/example -DCMAKE_PREFIX_PATH="$torch;$torchmoe"
//   cmake --build build/example && build/example/train_moe
//
// Shapes: T points, H hidden size, E experts.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include <torch/torch.h>

#include <torchmoe/nn/moe.h>

constexpr int64_t kRegimes = 4;
constexpr int64_t kExperts = 4;
constexpr int64_t kHidden = 16;
constexpr int64_t kInner = 8;
constexpr int64_t kBatch = 512;
constexpr int kSteps = 800;

// ---- the data: one law per quadrant -------------------------------------------------------------

struct Batch {
  torch::Tensor points;   // [T, 2]
  torch::Tensor targets;  // [T]
  torch::Tensor regimes;  // [T] int64, the quadrant; only the table at the end looks at it
};

const char* const kLaws[kRegimes] = {"sin 3a", "2b", "-3ab", "a - b + 1"};

Batch sample(int64_t count) {
  const auto side = torch::randint(0, 2, {count, 2});                                    // [T, 2]
  const auto points = (2 * side - 1) * (0.15 + 0.85 * torch::rand({count, 2}));          // [T, 2]
  const auto a = points.select(1, 0), b = points.select(1, 1);                           // [T]
  const auto laws = torch::stack({torch::sin(3 * a), 2 * b, -3 * a * b, a - b + 1}, 1);  // [T, 4]
  const auto regimes = (2 * side.select(1, 0) + side.select(1, 1)).to(torch::kLong);     // [T]
  return {points, laws.gather(1, regimes.unsqueeze(1)).squeeze(1), regimes};
}

// ---- the model: a torchmoe layer like any other module ------------------------------------------

struct RegressorImpl : torch::nn::Module {
  RegressorImpl()
      : embed(register_module("embed", torch::nn::Linear(2, kHidden))),
        moe(register_module(
            "moe",
            torchmoe::nn::MoE(
                torchmoe::nn::MoEOptions(kHidden, kInner, kExperts, /*top_k=*/1).bias(true)))),
        head(register_module("head", torch::nn::Linear(kHidden, 1))) {}

  // The prediction [T], the loss that balances the experts, and each point's expert [T].
  struct Output {
    torch::Tensor prediction, aux_loss, expert;
  };
  Output forward(const torch::Tensor& points) {
    const auto hidden = embed(points);        // [T, H]
    const auto mixed = moe->forward(hidden);  // hidden_states [T, H], aux_loss, routing
    const auto prediction = head(mixed.hidden_states).squeeze(1);  // [T]
    return {prediction, mixed.aux_loss, mixed.routing.indices.squeeze(1)};
  }

  torch::nn::Linear embed;
  torchmoe::nn::MoE moe;
  torch::nn::Linear head;
};
TORCH_MODULE(Regressor);

// ---- training -----------------------------------------------------------------------------------

double held_out_loss(Regressor& model, const Batch& batch) {
  torch::NoGradGuard no_grad;
  return torch::mse_loss(model->forward(batch.points).prediction, batch.targets).item<double>();
}

void train(Regressor& model, const Batch& held_out) {
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(1e-2));
  for (int step = 1; step <= kSteps; ++step) {
    const auto batch = sample(kBatch);
    const auto output = model->forward(batch.points);
    const auto loss = torch::mse_loss(output.prediction, batch.targets);

    optimizer.zero_grad();
    (loss + output.aux_loss).backward();
    optimizer.step();

    if (step % 100 == 0) {
      std::printf("step %4d   held-out loss %.4f\n", step, held_out_loss(model, held_out));
    }
  }
}

// ---- which expert took which regime -------------------------------------------------------------

void print_table(Regressor& model, const Batch& batch) {
  torch::NoGradGuard no_grad;
  const auto expert = model->forward(batch.points).expert;  // [T]
  const auto cell = batch.regimes * kExperts + expert;      // [T]
  const auto counts = torch::bincount(cell, {}, kRegimes * kExperts).view({kRegimes, kExperts});
  const auto share = 100.0 * counts / counts.sum(1, /*keepdim=*/true);  // [regimes, E], percent

  std::printf("\n%-26s", "regime");
  for (int64_t e = 0; e < kExperts; ++e) {
    std::printf("  expert %d", static_cast<int>(e));
  }
  for (int64_t r = 0; r < kRegimes; ++r) {
    const auto where =
        std::string("a ") + (r / 2 ? "> 0" : "< 0") + ", b " + (r % 2 ? "> 0" : "< 0");
    std::printf("\n%-14s%-12s", where.c_str(), kLaws[r]);
    for (int64_t e = 0; e < kExperts; ++e) {
      std::printf("  %7.0f%%", share[r][e].item<double>());
    }
  }
  std::printf("\n\n");
}

int main() {
  torch::manual_seed(2);
  torch::set_num_threads(1);  // so small a model gains nothing from more
  Regressor model;
  const auto held_out = sample(4096);

  const double before = held_out_loss(model, held_out);
  std::printf("step    0   held-out loss %.4f\n", before);
  train(model, held_out);
  const double after = held_out_loss(model, held_out);
  print_table(model, held_out);

  const bool learned = after < 0.05 * before;
  std::printf(
      "%s: held-out loss %.4f -> %.4f\n", learned ? "learned" : "did not learn", before, after);
  return learned ? EXIT_SUCCESS : EXIT_FAILURE;
}
