#include "expert_table.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include <torch/types.h>

namespace {

constexpr int64_t kLayersInATable = 10;  // fit into 80 columns

/// shares float64 [L, E] in percent.
void print_part(const at::Tensor& shares, int64_t first_layer) {
  const int64_t layers = shares.size(0), experts = shares.size(1);
  const auto print_row = [layers](const at::Tensor& values, const char* format) {  // [L]
    for (int64_t layer = 0; layer < layers; ++layer) {
      std::printf(format, values[layer].item<double>());
    }
    std::printf("\n");
  };
  std::printf("\n     layer");
  for (int64_t layer = 0; layer < layers; ++layer) {
    std::printf(" %6d", static_cast<int>(first_layer + layer));
  }
  std::printf("\n");
  for (int64_t expert = 0; expert < experts; ++expert) {
    std::printf("expert %3d", static_cast<int>(expert));
    print_row(shares.select(1, expert), " %6.1f");
  }
  std::printf("most/even ");
  print_row(shares.amax(1) * experts / 100, " %6.2f");
  std::printf("least/even");
  print_row(shares.amin(1) * experts / 100, " %6.2f");
}

}  // namespace

void print_expert_table(const at::Tensor& counts) {
  const auto shares = 100 * counts.to(torch::kDouble) / counts.sum(1, /*keepdim=*/true);  // [L, E]
  std::printf("\nExperts' shares of the validation bytes, percent (%.1f is even):\n",
              100.0 / static_cast<double>(counts.size(1)));
  for (int64_t first = 0; first < counts.size(0); first += kLayersInATable) {
    const auto last = std::min(first + kLayersInATable, counts.size(0));
    print_part(shares.slice(/*dim=*/0, first, last), first);
  }
  std::fflush(stdout);
}
