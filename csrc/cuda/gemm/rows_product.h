// Products of rows in expert order with each expert's own matrix, tile by tile: what the kernels of
// grouped_linear and expert_mlp are made of. What becomes of a tile's sums is a function object.
#pragma once

#include <type_traits>

#include <ATen/OpMathType.h>

#include "cuda/gemm/simple_engine.h"
#include "cuda/gemm/tensor_core_engine.h"
#include "cuda/gemm/tile_map.h"

namespace torchmoe::cuda {

template <typename T>
using Engine = std::conditional_t<sizeof(T) == 2, TensorCoreEngine<T>, SimpleEngine<T>>;

/// How many elements a thread finishes at a time.
constexpr int kGroupSize = 8;

/// A tile of the result: rows begin .. end of an expert, columns from first_column on.
struct ResultTile {
  int64_t expert;
  int64_t begin;
  int64_t end;
  int64_t first_column;
  int64_t column_tile;
};

/// Calls body(row in the tile, column in the tile) for every group of the first `columns` columns.
/// The threads of a warp stay together.
template <typename Engine, int columns = Engine::kColumns, typename Body>
__device__ void for_each_group(const Body& body) {
  constexpr int groups_per_row = columns / kGroupSize;
  static_assert(Engine::kRows * groups_per_row % Engine::kThreads == 0);
  for (int i = static_cast<int>(threadIdx.x); i < Engine::kRows * groups_per_row;
       i += Engine::kThreads) {
    body(i / groups_per_row, i % groups_per_row * kGroupSize);
  }
}

/// A group of a tile's sums.
template <typename Engine>
__device__ Vector<typename Engine::Acc, kGroupSize> read_sums(const typename Engine::Acc* sums,
                                                              int row,
                                                              int column) {
  constexpr int size = Engine::kStagingStride % 4 == 0 ? 4 : 1;
  const auto* from = sums + row * Engine::kStagingStride + column;
  Vector<typename Engine::Acc, kGroupSize> group;
  for (int i = 0; i < kGroupSize / size; ++i) {
    vector_at<size>(&group.values[0], i) = vector_at<size>(from, i);
  }
  return group;
}

/// Moves up to kGroupSize elements between a row of T and a group of Acc, widening or rounding.
template <typename T, typename Acc>
__device__ Vector<Acc, kGroupSize> read_group(const T* from, int64_t count, bool aligned) {
  constexpr int size = kVectorBytes / sizeof(T);
  Vector<Acc, kGroupSize> group;
  if (aligned && count >= kGroupSize) {
    for (int i = 0; i < kGroupSize / size; ++i) {
      const Vector<T, size> part = vector_at<size>(from, i);
      for (int n = 0; n < size; ++n) {
        group.values[i * size + n] = static_cast<Acc>(part.values[n]);
      }
    }
  } else {
    for (int n = 0; n < kGroupSize; ++n) {
      group.values[n] = n < count ? static_cast<Acc>(from[n]) : Acc(0);
    }
  }
  return group;
}

template <typename T, typename Acc>
__device__ void write_group(T* to,
                            const Vector<Acc, kGroupSize>& group,
                            int64_t count,
                            bool aligned) {
  constexpr int size = kVectorBytes / sizeof(T);
  if (aligned && count >= kGroupSize) {
    for (int i = 0; i < kGroupSize / size; ++i) {
      Vector<T, size> part;
      for (int n = 0; n < size; ++n) {
        part.values[n] = static_cast<T>(group.values[i * size + n]);
      }
      vector_at<size>(to, i) = part;
    }
  } else {
    for (int n = 0; n < kGroupSize && n < count; ++n) {
      to[n] = static_cast<T>(group.values[n]);
    }
  }
}

/// Adds a row vector's group, where there is one.
template <typename T, typename Acc>
__device__ void add_bias(Vector<Acc, kGroupSize>& group, const T* bias, int64_t count) {
  for (int n = 0; bias != nullptr && n < kGroupSize && n < count; ++n) {
    group.values[n] += static_cast<Acc>(bias[n]);
  }
}

/// How the columns of a result are put into tiles: each by itself, or two that belong together, which
/// lie half of the width or one column apart.
enum class Columns { single, halves, neighbours };

/// result[r, n] = sum over depth of rows[source of r, depth] b[e][n, depth] for expert e's rows.
template <typename T, Contiguous b_contiguous_, Columns columns, typename Finish_>
struct RowsProduct {
  using Value = T;
  using Finish = Finish_;
  static constexpr Contiguous a_contiguous = Contiguous::depth;
  static constexpr Contiguous b_contiguous = b_contiguous_;

  struct Tile {
    ResultTile result;
    Operand<T> a;
    Operand<T> b;
    int64_t depth;
  };

  TileMap map;
  const T* rows;               // [., depth]
  const int64_t* sources;      // [N], null: every row is in its place
  Matrices<const T> matrices;  // [E, width, depth]
  int64_t depth;
  int64_t width;
  bool rows_aligned;
  bool matrices_aligned;
  Finish finish;

  /// Columns of what is made of the result: one for two that belong together.
  __host__ __device__ int64_t result_columns() const {
    return columns == Columns::single ? width : width / 2;
  }
  __host__ __device__ int64_t tile_columns() const {
    return columns == Columns::single ? Engine<T>::kColumns : Engine<T>::kColumns / 2;
  }
  __host__ __device__ int64_t column_tiles() const {
    return (result_columns() + tile_columns() - 1) / tile_columns();
  }
  int64_t num_blocks() const { return map.num_tiles * column_tiles(); }

  /// Column tiles of the same rows come one after another: the rows stay in the cache.
  __device__ bool locate(int64_t block, Tile& tile) const {
    const auto [expert, begin] = map.tiles[block / column_tiles()];
    if (expert < 0) {
      return false;
    }
    const int64_t column_tile = block % column_tiles();
    const int64_t first_column = column_tile * tile_columns();
    tile.result = {expert, begin, map.end({expert, begin}), first_column, column_tile};
    tile.depth = depth;
    tile.a = {rows, depth, {begin, tile.result.end, sources}, 0, depth};
    tile.a.aligned = rows_aligned;
    constexpr bool halves = columns == Columns::halves;
    const int64_t first = columns == Columns::neighbours ? 2 * first_column : first_column;
    tile.b.data = matrices.of(expert).data;
    tile.b.row_stride = matrices.stride;
    tile.b.aligned = matrices_aligned;
    if constexpr (b_contiguous == Contiguous::depth) {
      tile.b.lines = {first, halves ? width / 2 : width, nullptr};
      tile.b.num_columns = depth;
      if constexpr (halves) {
        tile.b.lines.half = tile_columns();
        tile.b.lines.second = width / 2;
      }
    } else {
      tile.b.lines = {0, depth, nullptr};
      tile.b.first_column = first;
      tile.b.num_columns = width;
      if constexpr (halves) {
        tile.b.half = tile_columns();
        tile.b.second = width / 2;
      }
    }
    return true;
  }

  __device__ void operator()(const Tile& tile, const typename Engine<T>::Acc* sums) const {
    finish(tile.result, sums);
  }
};

/// A block's work: its tile's product, and what is done with it.
template <typename Product>
__global__ void __launch_bounds__(Engine<typename Product::Value>::kThreads,
                                  Engine<typename Product::Value>::kBlocksPerMultiprocessor)
    product_kernel(Product product) {
  typename Product::Tile tile;
  if (!product.locate(blockIdx.x, tile)) {
    return;
  }
  Engine<typename Product::Value> engine(shared_memory());
  auto* sums = engine.template multiply<Product::a_contiguous, Product::b_contiguous>(
      tile.a, tile.b, tile.depth);
  // Found again: kept meanwhile, it would take registers that the product needs.
  product.locate(blockIdx.x, tile);
  product(tile, sums);
}

template <typename Product>
void run_product(Stream stream, const Product& product) {
  using ProductEngine = Engine<typename Product::Value>;
  launch(stream,
         product.num_blocks(),
         ProductEngine::kThreads,
         ProductEngine::kSharedBytes,
         product_kernel<Product>,
         product);
}

/// The product of rows with every expert's matrix, [E, width, depth] in either orientation.
template <Columns columns, typename T, typename Finish>
void run_rows_product(Stream stream,
                      const TileMap& map,
                      const T* rows,
                      const int64_t* sources,
                      const Matrices<const T>& matrices,
                      int64_t depth,
                      int64_t width,
                      const Finish& finish) {
  // Lines must end with a vector, and so must halves that lie along them.
  const int64_t line = !matrices.transposed         ? depth
                       : columns == Columns::halves ? width / 2
                                                    : width;
  const bool aligned = allows_vectors(matrices) && allows_vectors(matrices.data, line);
  const auto run = [&]<Contiguous b_contiguous>() {
    run_product(stream,
                RowsProduct<T, b_contiguous, columns, Finish>{map,
                                                              rows,
                                                              sources,
                                                              matrices,
                                                              depth,
                                                              width,
                                                              allows_vectors(rows, depth),
                                                              aligned,
                                                              finish});
  };
  if (matrices.transposed) {
    run.template operator()<Contiguous::side>();
  } else {
    run.template operator()<Contiguous::depth>();
  }
}

}  // namespace torchmoe::cuda
