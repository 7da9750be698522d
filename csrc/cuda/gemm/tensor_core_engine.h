// A block's product of two operands on the tensor cores: 16-bit elements, sums in float32.
//
// The operands come in boxes of 64 along the depth, copied asynchronously into a ring of stages
// while the boxes before them are multiplied. Within a line of a box, groups of eight elements (16
// bytes) are swapped by the line's number, so that the eight lines that one matrix load reads lie
// in different banks.
#pragma once

#include "cuda/gemm/operand.h"
#include "cuda/gemm/tensor_core.h"
#include "cuda/warp.h"

namespace torchmoe::cuda {

template <typename T>
class TensorCoreEngine {
 public:
  using Acc = float;

  // 8 warps, 2 down and 4 across, each with 64 x 32 sums in registers: per 16 of depth a warp
  // loads 6 KB for 16 tensor-core instructions.
  static constexpr int kRows = 128;
  static constexpr int kColumns = 128;
  static constexpr int kThreads = 256;
  // A second block fits on a multiprocessor of 228 KB (sm_90), and one on any from sm_80 on.
  static constexpr int kDepth = 64;
  static constexpr int kStages = 3;

  /// Sums in shared memory, [kRows][kStagingStride]; the padding spreads a column over the banks.
  static constexpr int kStagingStride = kColumns + 4;
  static constexpr int kStageNumbers = (kRows + kColumns) * kDepth;
  static constexpr std::size_t kStageBytes = kStages * kStageNumbers * sizeof(T);
  static constexpr std::size_t kStagingBytes = kRows * kStagingStride * sizeof(Acc);
  static constexpr std::size_t kSharedBytes =
      kStageBytes > kStagingBytes ? kStageBytes : kStagingBytes;
  // What the launch bound asks for; sm_80's and sm_90's registers hold it.
  static constexpr int kBlocksPerMultiprocessor = 2;

  __device__ explicit TensorCoreEngine(unsigned char* shared)
      : stages_(reinterpret_cast<T*>(shared)) {}

  /// Forms the sums over `depth` and leaves them in shared memory.
  template <Contiguous a_contiguous, Contiguous b_contiguous>
  __device__ Acc* multiply(const Operand<T>& a, const Operand<T>& b, int64_t depth) {
    const int64_t num_boxes = (depth + kDepth - 1) / kDepth;
    for (int64_t box = 0; box < kStages - 1; ++box) {
      load<a_contiguous, b_contiguous>(a, b, box, num_boxes);
    }
    for (int64_t box = 0; box < num_boxes; ++box) {
      wait_for_copies<kStages - 2>();
      // Now every thread's part of this box has come, and every thread is done with the box whose
      // stage is filled next.
      __syncthreads();
      load<a_contiguous, b_contiguous>(a, b, box + kStages - 1, num_boxes);
      multiply_box<a_contiguous, b_contiguous>(stages_ + box % kStages * kStageNumbers);
    }
    wait_for_copies<0>();
    __syncthreads();
    return store();
  }

 private:
  static constexpr int kGroup = kVectorBytes / sizeof(T);
  static constexpr int kWarpRows = 64;
  static constexpr int kWarpColumns = 32;
  static constexpr int kRowFragments = kWarpRows / 16;
  static constexpr int kColumnFragments = kWarpColumns / 8;
  static constexpr int kInstructionDepth = 16;

  /// How many elements a line of an operand's box has.
  template <Contiguous contiguous>
  __device__ static constexpr int line_size() {
    static_assert(kRows == kColumns);
    return contiguous == Contiguous::depth ? kDepth : kRows;
  }

  template <Contiguous contiguous>
  __device__ static T* group_at(T* box, int line, int group) {
    return box + line * line_size<contiguous>() + (group ^ (line & 7)) * kGroup;
  }

  template <Contiguous a_contiguous, Contiguous b_contiguous>
  __device__ void load(const Operand<T>& a, const Operand<T>& b, int64_t box, int64_t num_boxes) {
    if (box < num_boxes) {
      T* stage = stages_ + box % kStages * kStageNumbers;
      load_box<a_contiguous>(a, box * kDepth, stage);
      load_box<b_contiguous>(b, box * kDepth, stage + kRows * kDepth);
    }
    end_copy_group();  // without a box too: groups are counted
  }

  template <Contiguous contiguous>
  __device__ static void load_box(const Operand<T>& operand, int64_t depth_begin, T* box) {
    constexpr int groups_per_line = line_size<contiguous>() / kGroup;
    constexpr int groups = kRows * kDepth / kGroup;
    constexpr bool along_depth = contiguous == Contiguous::depth;
    const int64_t first_line = along_depth ? 0 : depth_begin;
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < groups; i += kThreads) {
      const int line = i / groups_per_line;
      const int group = i % groups_per_line;
      const int64_t row = operand.lines.row(first_line + line);
      const int64_t column =
          along_depth ? depth_begin + group * kGroup : operand.column(group * kGroup);
      T* to = group_at<contiguous>(box, line, group);
      const T* from = operand.data + row * operand.row_stride + column;
      if (operand.aligned) {
        const bool there = row >= 0 && column < operand.num_columns;
        start_copy_16(to, there ? from : operand.data, there ? kVectorBytes : 0);
      } else {
        Vector<T, kGroup> numbers;
        for (int n = 0; n < kGroup; ++n) {
          numbers.values[n] = row >= 0 && column + n < operand.num_columns ? from[n] : T(0);
        }
        vector_at<kGroup>(to, 0) = numbers;
      }
    }
  }

  template <Contiguous a_contiguous, Contiguous b_contiguous>
  __device__ void multiply_box(T* stage) {
    T* a_box = stage;
    T* b_box = stage + kRows * kDepth;
    const int row = warp_in_block() / 4 * kWarpRows;
    const int column = warp_in_block() % 4 * kWarpColumns;
#pragma unroll
    for (int k = 0; k < kDepth; k += kInstructionDepth) {
      unsigned a[kRowFragments][4];
      unsigned b[kColumnFragments / 2][4];
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
        load_row_fragment<a_contiguous>(a[i], a_box, row + i * 16, k);
      }
#pragma unroll
      for (int j = 0; j < kColumnFragments / 2; ++j) {
        load_column_fragments<b_contiguous>(b[j], b_box, column + j * 16, k);
      }
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnFragments; ++j) {
          multiply_add<T>(sums_[i][j], a[i], b[j / 2] + j % 2 * 2);
        }
      }
    }
  }

  /// 16 x 16 of a: the matrices are its upper and lower half, for the first eight of depth and then
  /// the others.
  template <Contiguous contiguous>
  __device__ static void load_row_fragment(unsigned (&fragment)[4], T* box, int row, int k) {
    const int matrix = lane_id() / 8;
    const int line = lane_id() % 8;
    if constexpr (contiguous == Contiguous::depth) {
      load_matrices(fragment,
                    group_at<contiguous>(box, row + matrix % 2 * 8 + line, k / 8 + matrix / 2));
    } else {
      load_matrices_transposed(
          fragment, group_at<contiguous>(box, k + matrix / 2 * 8 + line, row / 8 + matrix % 2));
    }
  }

  /// 16 columns by 16 of depth of b, two fragments of two matrices: the first eight of depth, and
  /// the others.
  template <Contiguous contiguous>
  __device__ static void load_column_fragments(unsigned (&fragments)[4],
                                               T* box,
                                               int column,
                                               int k) {
    const int matrix = lane_id() / 8;
    const int line = lane_id() % 8;
    if constexpr (contiguous == Contiguous::depth) {
      load_matrices(fragments,
                    group_at<contiguous>(box, column + matrix / 2 * 8 + line, k / 8 + matrix % 2));
    } else {
      load_matrices_transposed(
          fragments, group_at<contiguous>(box, k + matrix % 2 * 8 + line, column / 8 + matrix / 2));
    }
  }

  /// The stages have served; the sums take their memory.
  __device__ Acc* store() const {
    auto* staging = reinterpret_cast<Acc*>(stages_);
    const int row = warp_in_block() / 4 * kWarpRows + lane_id() / 4;
    const int column = warp_in_block() % 4 * kWarpColumns + lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          staging[(row + i * 16 + n / 2 * 8) * kStagingStride + column + j * 8 + n % 2] =
              sums_[i][j][n];
        }
      }
    }
    __syncthreads();
    return staging;
  }

  T* stages_;
  Acc sums_[kRowFragments][kColumnFragments][4] = {};
};

}  // namespace torchmoe::cuda
