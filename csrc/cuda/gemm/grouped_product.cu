#include "cuda/gemm/grouped_product.h"

#include "common/float_types.h"
#include "cuda/gemm/rows_product.h"

namespace torchmoe::cuda {

namespace {

/// Rounds a tile's sums into the result, a bias added.
template <typename T, typename Out>
struct StoreRows {
  Out* out;
  const T* bias;  // [E, width] or null
  int64_t width;
  bool aligned;

  __device__ void operator()(const ResultTile& tile, const typename Engine<T>::Acc* sums) const {
    for_each_group<Engine<T>>([&](int r, int c) {
      const int64_t row = tile.begin + r;
      const int64_t column = tile.first_column + c;
      if (row < tile.end && column < width) {
        auto group = read_sums<Engine<T>>(sums, r, c);
        if (bias != nullptr) {
          add_bias(group, bias + tile.expert * width + column, width - column);
        }
        write_group(out + row * width + column, group, width - column, aligned);
      }
    });
  }
};

/// grad_weight[e][o, i] = sum over expert e's rows r of grad[r, o] rows[r, i]: every expert has the
/// same tiles, and its rows are the depth.
template <typename T>
struct WeightProduct {
  using Value = T;
  static constexpr Contiguous a_contiguous = Contiguous::side;
  static constexpr Contiguous b_contiguous = Contiguous::side;

  struct Tile {
    int64_t expert;
    Operand<T> a;
    Operand<T> b;
    int64_t depth;
  };

  TileMap map;
  const T* grad;
  const int64_t* grad_sources;
  const T* rows;
  const int64_t* row_sources;
  Matrices<T> grad_weight;  // whose rows are contiguous
  int64_t in_features;
  int64_t out_features;
  bool grad_aligned;
  bool rows_aligned;
  bool result_aligned;

  __host__ __device__ int64_t out_tiles() const {
    return (out_features + Engine<T>::kRows - 1) / Engine<T>::kRows;
  }
  __host__ __device__ int64_t in_tiles() const {
    return (in_features + Engine<T>::kColumns - 1) / Engine<T>::kColumns;
  }
  int64_t num_blocks() const { return map.num_experts * out_tiles() * in_tiles(); }

  __device__ bool locate(int64_t block, Tile& tile) const {
    tile.expert = block / (out_tiles() * in_tiles());
    const int64_t in_expert = block % (out_tiles() * in_tiles());
    const int64_t begin = map.offsets[tile.expert];
    const int64_t end = map.offsets[tile.expert + 1];
    tile.depth = end - begin;
    tile.a = {grad,
              out_features,
              {begin, end, grad_sources},
              in_expert / in_tiles() * Engine<T>::kRows,
              out_features};
    tile.a.aligned = grad_aligned;
    tile.b = {rows,
              in_features,
              {begin, end, row_sources},
              in_expert % in_tiles() * Engine<T>::kColumns,
              in_features};
    tile.b.aligned = rows_aligned;
    return true;
  }

  __device__ void operator()(const Tile& tile, const typename Engine<T>::Acc* sums) const {
    for_each_group<Engine<T>>([&](int r, int c) {
      const int64_t row = tile.a.first_column + r;
      const int64_t column = tile.b.first_column + c;
      if (row < out_features && column < in_features) {
        T* to = grad_weight.of(tile.expert).from(row, column).data;
        write_group(to, read_sums<Engine<T>>(sums, r, c), in_features - column, result_aligned);
      }
    });
  }
};

// A block sums 32 columns of an expert's rows: its warps take every eighth row each, and their sums
// are added in the warps' order.
constexpr int kSumWarps = 8;
constexpr int kSumThreads = kSumWarps * kWarpSize;

template <typename T>
__global__ void __launch_bounds__(kSumThreads) grad_bias_kernel(TileMap map,
                                                                const T* grad,
                                                                const int64_t* sources,
                                                                const at::opmath_type<T>* weights,
                                                                T* grad_bias,
                                                                int64_t width) {
  using Acc = at::opmath_type<T>;
  __shared__ Acc of_warps[kSumWarps][kWarpSize];
  const int64_t column_blocks = (width + kWarpSize - 1) / kWarpSize;
  const int64_t expert = blockIdx.x / column_blocks;
  const int64_t column = blockIdx.x % column_blocks * kWarpSize + lane_id();
  Acc sum = 0;
  for (int64_t r = map.offsets[expert] + warp_in_block(); r < map.offsets[expert + 1];
       r += kSumWarps) {
    const int64_t source = sources == nullptr ? r : sources[r];
    if (column < width && source >= 0) {
      const Acc weight = weights == nullptr ? Acc(1) : weights[r];
      sum += weight * static_cast<Acc>(grad[source * width + column]);
    }
  }
  of_warps[warp_in_block()][lane_id()] = sum;
  __syncthreads();
  if (warp_in_block() == 0 && column < width) {
    Acc total = 0;
    for (int w = 0; w < kSumWarps; ++w) {
      total += of_warps[w][lane_id()];
    }
    grad_bias[expert * width + column] = static_cast<T>(total);
  }
}

constexpr int kZeroThreads = 128;
constexpr int kZeroWarps = kZeroThreads / kWarpSize;

template <typename T>
__global__ void __launch_bounds__(kZeroThreads)
    zero_unrouted_rows_kernel(TileMap map, T* rows, int64_t width) {
  const int64_t row = warp_in_grid();
  if (row >= map.num_rows || (row >= map.offsets[0] && row < map.offsets[map.num_experts])) {
    return;
  }
  for (int64_t i = lane_id(); i < width; i += kWarpSize) {
    rows[row * width + i] = T(0);
  }
}

}  // namespace

template <typename T>
int64_t product_tile_rows() {
  return Engine<T>::kRows;
}

template <typename T, typename Out>
void grouped_linear(Stream stream,
                    const TileMap& map,
                    const SourceRows<T>& rows,
                    const Matrices<const T>& weight,
                    const T* bias,
                    Out* out,
                    int64_t in_features,
                    int64_t out_features) {
  run_rows_product<Columns::single>(
      stream,
      map,
      rows.data,
      rows.sources,
      weight,
      in_features,
      out_features,
      StoreRows<T, Out>{out, bias, out_features, allows_vectors(out, out_features)});
}

template <typename T, typename Out>
void grouped_linear_grad_rows(Stream stream,
                              const TileMap& map,
                              const SourceRows<T>& grad,
                              const Matrices<const T>& weight,
                              Out* grad_rows,
                              int64_t in_features,
                              int64_t out_features) {
  run_rows_product<Columns::single>(
      stream,
      map,
      grad.data,
      grad.sources,
      weight.transpose(),
      out_features,
      in_features,
      StoreRows<T, Out>{grad_rows, nullptr, in_features, allows_vectors(grad_rows, in_features)});
}

template <typename T>
void grouped_linear_grad_weight(Stream stream,
                                const TileMap& map,
                                const SourceRows<T>& grad,
                                const SourceRows<T>& rows,
                                const Matrices<T>& grad_weight,
                                int64_t in_features,
                                int64_t out_features) {
  if (grad_weight.transposed) {
    return grouped_linear_grad_weight(
        stream, map, rows, grad, grad_weight.transpose(), out_features, in_features);
  }
  run_product(stream,
              WeightProduct<T>{map,
                               grad.data,
                               grad.sources,
                               rows.data,
                               rows.sources,
                               grad_weight,
                               in_features,
                               out_features,
                               allows_vectors(grad.data, out_features),
                               allows_vectors(rows.data, in_features),
                               allows_vectors(grad_weight)});
}

template <typename T>
void grouped_linear_grad_bias(Stream stream,
                              const TileMap& map,
                              const SourceRows<T>& grad,
                              const at::opmath_type<T>* weights,
                              T* grad_bias,
                              int64_t out_features) {
  const int64_t column_blocks = (out_features + kWarpSize - 1) / kWarpSize;
  launch(stream,
         map.num_experts * column_blocks,
         kSumThreads,
         0,
         grad_bias_kernel<T>,
         map,
         grad.data,
         grad.sources,
         weights,
         grad_bias,
         out_features);
}

template <typename T>
void zero_unrouted_rows(Stream stream, const TileMap& map, T* rows, int64_t width) {
  launch(stream,
         (map.num_rows + kZeroWarps - 1) / kZeroWarps,
         kZeroThreads,
         0,
         zero_unrouted_rows_kernel<T>,
         map,
         rows,
         width);
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_INSTANTIATE_ROWS(T, Out)                          \
  template void grouped_linear(Stream,                             \
                               const TileMap&,                     \
                               const SourceRows<T>&,               \
                               const Matrices<const T>&,           \
                               const T*,                           \
                               Out*,                               \
                               int64_t,                            \
                               int64_t);                           \
  template void grouped_linear_grad_rows(Stream,                   \
                                         const TileMap&,           \
                                         const SourceRows<T>&,     \
                                         const Matrices<const T>&, \
                                         Out*,                     \
                                         int64_t,                  \
                                         int64_t);
#define TORCHMOE_INSTANTIATE(T, ...)                                                         \
  TORCHMOE_INSTANTIATE_ROWS(T, T)                                                            \
  template int64_t product_tile_rows<T>();                                                   \
  template void grouped_linear_grad_weight(Stream,                                           \
                                           const TileMap&,                                   \
                                           const SourceRows<T>&,                             \
                                           const SourceRows<T>&,                             \
                                           const Matrices<T>&,                               \
                                           int64_t,                                          \
                                           int64_t);                                         \
  template void grouped_linear_grad_bias(                                                    \
      Stream, const TileMap&, const SourceRows<T>&, const at::opmath_type<T>*, T*, int64_t); \
  template void zero_unrouted_rows(Stream, const TileMap&, T*, int64_t);
#define TORCHMOE_INSTANTIATE_WIDE(T, ...) TORCHMOE_INSTANTIATE_ROWS(T, at::opmath_type<T>)
TORCHMOE_FLOAT_TYPES(TORCHMOE_INSTANTIATE)
TORCHMOE_NARROW_TYPES(TORCHMOE_INSTANTIATE_WIDE)
#undef TORCHMOE_INSTANTIATE_WIDE
#undef TORCHMOE_INSTANTIATE
#undef TORCHMOE_INSTANTIATE_ROWS
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace torchmoe::cuda
