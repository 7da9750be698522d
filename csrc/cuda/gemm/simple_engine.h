// A block's product of two operands in the precision of their sums: float32 and float64, for which
// the tensor cores would round, and types that these have no instruction for.
#pragma once

#include <ATen/OpMathType.h>

#include "cuda/gemm/operand.h"
#include "cuda/launch.h"

namespace torchmoe::cuda {

template <typename T>
class SimpleEngine {
 public:
  using Acc = at::opmath_type<T>;

  static constexpr int kRows = 64;
  static constexpr int kColumns = 64;
  static constexpr int kDepth = 16;
  static constexpr int kThreads = 256;
  // Two blocks hide each other's waits; float64's sums need all the registers that one can have.
  static constexpr int kBlocksPerMultiprocessor = sizeof(Acc) == 4 ? 2 : 1;

  /// Sums in shared memory, [kRows][kStagingStride].
  static constexpr int kStagingStride = kColumns + 1;
  // A line of a box is all sides at one depth; the padding spreads one side over the banks.
  static constexpr int kLine = kRows + 1;
  static constexpr std::size_t kBoxBytes = 2 * kDepth * kLine * sizeof(Acc);
  static constexpr std::size_t kStagingBytes = kRows * kStagingStride * sizeof(Acc);
  static constexpr std::size_t kSharedBytes = kBoxBytes > kStagingBytes ? kBoxBytes : kStagingBytes;

  __device__ explicit SimpleEngine(unsigned char* shared)
      : shared_(reinterpret_cast<Acc*>(shared)) {}

  /// Forms the sums over `depth` and leaves them in shared memory.
  template <Contiguous a_contiguous, Contiguous b_contiguous>
  __device__ Acc* multiply(const Operand<T>& a, const Operand<T>& b, int64_t depth) {
    Acc* a_box = shared_;
    Acc* b_box = shared_ + kDepth * kLine;
    for (int64_t begin = 0; begin < depth; begin += kDepth) {
      load_box<a_contiguous>(a, begin, a_box);
      load_box<b_contiguous>(b, begin, b_box);
      __syncthreads();
      for (int k = 0; k < kDepth; ++k) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
#pragma unroll
          for (int j = 0; j < kSums; ++j) {
            sums_[i][j] += a_box[k * kLine + row(i)] * b_box[k * kLine + column(j)];
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
        shared_[row(i) * kStagingStride + column(j)] = sums_[i][j];
      }
    }
    __syncthreads();
    return shared_;
  }

 private:
  // Threads are 16 x 16; each has every sixteenth row and column.
  static constexpr int kSide = 16;
  static constexpr int kSums = kRows / kSide;

  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) / kSide + i * kSide; }
  __device__ static int column(int j) { return static_cast<int>(threadIdx.x) % kSide + j * kSide; }

  template <Contiguous contiguous>
  __device__ static void load_box(const Operand<T>& operand, int64_t depth_begin, Acc* box) {
    static_assert(kRows == kColumns);
    constexpr bool along_depth = contiguous == Contiguous::depth;
    constexpr int line_size = along_depth ? kDepth : kRows;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kDepth; i += kThreads) {
      const int line = i / line_size;
      const int place = i % line_size;
      const int64_t row = operand.lines.row((along_depth ? 0 : depth_begin) + line);
      const int64_t column = along_depth ? depth_begin + place : operand.column(place);
      const bool there = row >= 0 && column < operand.num_columns;
      const int depth = along_depth ? place : line;
      const int side = along_depth ? line : place;
      box[depth * kLine + side] =
          there ? static_cast<Acc>(operand.data[row * operand.row_stride + column]) : Acc(0);
    }
  }

  Acc* shared_;
  Acc sums_[kSums][kSums] = {};
};

}  // namespace torchmoe::cuda
