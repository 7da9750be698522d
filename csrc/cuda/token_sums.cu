#include "cuda/token_sums.h"

#include <algorithm>

#include "common/float_types.h"
#include "cuda/block_sum.h"

namespace torchmoe::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlockTokens = 256;
// A warp along the columns reads whole sectors of memory; the other threads lie along the tokens.
constexpr int kMaxColumnThreads = 32;

/// How sums are cut into blocks of threads, and how those lie: `column_threads` along the columns,
/// the others along the tokens.
struct Layout {
  TokenSizes sizes;
  int64_t token_blocks;  // of a sequence
  int64_t block_tokens;
  int column_threads;  // a power of two

  TORCHMOE_HOST_DEVICE int64_t column_blocks() const {
    return (sizes.num_columns + column_threads - 1) / column_threads;
  }
};

int column_threads_for(int64_t num_columns) {
  int threads = 1;
  while (threads < num_columns && threads < kMaxColumnThreads) {
    threads *= 2;
  }
  return threads;
}

/// sums [S, token blocks, C]: one block of threads for each of a sequence's blocks of tokens and of
/// columns.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    block_sums_kernel(Layout layout, const T* values, const bool* token_mask, double* sums) {
  const TokenSizes& sizes = layout.sizes;
  const int64_t column_block = blockIdx.x % layout.column_blocks();
  const int64_t block = blockIdx.x / layout.column_blocks();  // over all sequences
  const int64_t sequence = block / layout.token_blocks;
  const int64_t begin = block % layout.token_blocks * layout.block_tokens;
  const int64_t end = std::min(begin + layout.block_tokens, sizes.num_tokens);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = column_block * layout.column_threads + thread % layout.column_threads;
  double sum = 0;
  if (column < sizes.num_columns) {
    for (int64_t t = begin + thread / layout.column_threads; t < end;
         t += kThreads / layout.column_threads) {
      const int64_t token = sequence * sizes.num_tokens + t;
      if (token_mask == nullptr || token_mask[token]) {
        sum += static_cast<double>(values[token * sizes.num_columns + column]);
      }
    }
  }
  sum = block_sum<kThreads>(sum, layout.column_threads);
  if (thread < layout.column_threads && column < sizes.num_columns) {
    sums[block * sizes.num_columns + column] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    divide_by_counts_kernel(TokenSizes sizes, const double* sums, TokenCounts counts, T* means) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < sizes.num_sequences * sizes.num_columns) {
    const double count = counts.of(i / sizes.num_columns);
    means[i] = count == 0 ? T(0) : static_cast<T>(sums[i] / count);
  }
}

template <typename T>
void launch_block_sums(
    Stream stream, const Layout& layout, const T* values, const bool* token_mask, double* sums) {
  launch(stream,
         layout.sizes.num_sequences * layout.token_blocks * layout.column_blocks(),
         kThreads,
         0,
         block_sums_kernel<T>,
         layout,
         values,
         token_mask,
         sums);
}

}  // namespace

int64_t num_token_blocks(int64_t num_tokens) {
  return (num_tokens + kBlockTokens - 1) / kBlockTokens;
}

template <typename T>
void sum_over_tokens(Stream stream,
                     const TokenSizes& sizes,
                     const T* values,
                     const bool* token_mask,
                     double* block_sums,
                     double* sums) {
  const int column_threads = column_threads_for(sizes.num_columns);
  const int64_t num_blocks = num_token_blocks(sizes.num_tokens);
  launch_block_sums(
      stream, {sizes, num_blocks, kBlockTokens, column_threads}, values, token_mask, block_sums);
  // Then the blocks are the tokens, all of them in one block; a sequence without tokens has that
  // one too, which writes its zeros.
  const TokenSizes of_blocks{sizes.num_sequences, num_blocks, sizes.num_columns};
  launch_block_sums<double>(
      stream, {of_blocks, 1, num_blocks, column_threads}, block_sums, nullptr, sums);
}

template <typename T>
void divide_by_counts(Stream stream,
                      const TokenSizes& sizes,
                      const double* sums,
                      const TokenCounts& counts,
                      T* means) {
  launch(stream,
         (sizes.num_sequences * sizes.num_columns + kThreads - 1) / kThreads,
         kThreads,
         0,
         divide_by_counts_kernel<T>,
         sizes,
         sums,
         counts,
         means);
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_INSTANTIATE(T, ...) \
  template void sum_over_tokens(Stream, const TokenSizes&, const T*, const bool*, double*, double*);
TORCHMOE_FLOAT_TYPES(TORCHMOE_INSTANTIATE)
TORCHMOE_INSTANTIATE(bool)
#undef TORCHMOE_INSTANTIATE
#define TORCHMOE_INSTANTIATE(T, ...) \
  template void divide_by_counts(Stream, const TokenSizes&, const double*, const TokenCounts&, T*);
TORCHMOE_ACCUMULATE_TYPES(TORCHMOE_INSTANTIATE)
#undef TORCHMOE_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace torchmoe::cuda
