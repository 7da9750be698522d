#include "cuda/rows.h"

#include "common/float_types.h"
#include "cuda/vectors.h"
#include "cuda/warp.h"

namespace torchmoe::cuda {

namespace {

// A warp moves one row. Four of them to a block keep the rows of a block independent and every
// multiprocessor full.
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

int64_t blocks_for(int64_t num_rows) {
  return (num_rows + kWarps - 1) / kWarps;
}

template <typename T, int size>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(Plan given, const T* x, T* rows, int64_t width) {
  const PlanView plan = given.view();
  const int64_t row = warp_in_grid();
  if (row >= plan.num_rows()) {
    return;
  }
  const int64_t slot = plan.slot_of(row);
  T* out = rows + row * width;
  if (slot < 0) {
    for (int64_t i = lane_id(); i < width / size; i += kWarpSize) {
      vector_at<size>(out, i) = Vector<T, size>{};
    }
    return;
  }
  const T* in = x + slot / plan.top_k * width;
  for (int64_t i = lane_id(); i < width / size; i += kWarpSize) {
    vector_at<size>(out, i) = vector_at<size>(in, i);
  }
}

/// A warp sums one token's rows. Each lane looks up one of 32 slots; the others get its row from
/// there.
template <typename T, typename In, int size>
__global__ void __launch_bounds__(kThreads) combine_rows_kernel(
    Plan given, const In* rows, const at::opmath_type<T>* weights, T* y, int64_t width) {
  using Acc = at::opmath_type<T>;
  const PlanView plan = given.view();
  const int64_t token = warp_in_grid();
  if (token >= plan.num_tokens) {
    return;
  }
  const int64_t first_slot = token * plan.top_k;
  const int64_t num_vectors = width / size;
  // Every lane stays to the end: shuffles need them all.
  for (int64_t begin = 0; begin < num_vectors; begin += kWarpSize) {
    const int64_t i = begin + lane_id();
    Acc sum[size] = {};
    for (int64_t first = 0; first < plan.top_k; first += kWarpSize) {
      const int64_t j = first + lane_id();
      const int64_t row_here = j < plan.top_k ? plan.row_of(first_slot + j) : -1;
      const Acc weight_here =
          row_here < 0 ? Acc(0) : (weights == nullptr ? Acc(1) : weights[first_slot + j]);
      const int count =
          plan.top_k - first < kWarpSize ? static_cast<int>(plan.top_k - first) : kWarpSize;
      // Two rows under way for each warp; four make the compiler spill.
#pragma unroll 2
      for (int k = 0; k < count; ++k) {
        const int64_t row = __shfl_sync(kAllLanes, row_here, k);
        const Acc weight = __shfl_sync(kAllLanes, weight_here, k);
        if (row >= 0 && i < num_vectors) {
          const Vector<In, size> in = vector_at<size>(rows + row * width, i);
          for (int v = 0; v < size; ++v) {
            sum[v] += weight * static_cast<Acc>(in.values[v]);
          }
        }
      }
    }
    if (i < num_vectors) {
      Vector<T, size> out;
      for (int v = 0; v < size; ++v) {
        out.values[v] = static_cast<T>(sum[v]);
      }
      vector_at<size>(y + token * width, i) = out;
    }
  }
}

/// A warp takes row r, and slot r where that is not routed: a plan pairs every routed row with one
/// routed slot, so that each output has one writer.
template <typename T, int size>
__global__ void __launch_bounds__(kThreads)
    combine_rows_backward_kernel(Plan given,
                                 const T* grad,
                                 const T* rows,
                                 const at::opmath_type<T>* weights,
                                 T* grad_rows,
                                 at::opmath_type<T>* grad_weights,
                                 int64_t width) {
  using Acc = at::opmath_type<T>;
  const PlanView plan = given.view();
  const int64_t row = warp_in_grid();
  if (row >= plan.num_rows()) {
    return;
  }
  if (lane_id() == 0 && plan.row_of(row) < 0) {
    grad_weights[row] = Acc(0);
  }
  const int64_t slot = plan.slot_of(row);
  T* out = grad_rows + row * width;
  if (slot < 0) {
    for (int64_t i = lane_id(); i < width / size; i += kWarpSize) {
      vector_at<size>(out, i) = Vector<T, size>{};
    }
    return;
  }
  const Acc weight = weights[slot];
  const T* g = grad + slot / plan.top_k * width;
  const T* r = rows + row * width;
  Acc dot = 0;
  for (int64_t i = lane_id(); i < width / size; i += kWarpSize) {
    const Vector<T, size> of_grad = vector_at<size>(g, i);
    const Vector<T, size> of_row = vector_at<size>(r, i);
    Vector<T, size> weighted;
    for (int v = 0; v < size; ++v) {
      const auto value = static_cast<Acc>(of_grad.values[v]);
      dot += value * static_cast<Acc>(of_row.values[v]);
      weighted.values[v] = static_cast<T>(weight * value);
    }
    vector_at<size>(out, i) = weighted;
  }
  dot = warp_sum(dot);
  if (lane_id() == 0) {
    grad_weights[slot] = dot;
  }
}

}  // namespace

template <typename T>
void gather_rows(Stream stream, const Plan& plan, const T* x, T* rows, int64_t width) {
  with_vector_size<T>(
      width,
      [&](auto size) {
        launch(stream,
               blocks_for(plan.num_rows()),
               kThreads,
               0,
               gather_rows_kernel<T, decltype(size)::value>,
               plan,
               x,
               rows,
               width);
      },
      x,
      rows);
}

template <typename T, typename In>
void combine_rows(Stream stream,
                  const Plan& plan,
                  const In* rows,
                  const at::opmath_type<T>* weights,
                  T* y,
                  int64_t width) {
  with_vector_size<In>(
      width,
      [&](auto size) {
        launch(stream,
               blocks_for(plan.num_tokens),
               kThreads,
               0,
               combine_rows_kernel<T, In, decltype(size)::value>,
               plan,
               rows,
               weights,
               y,
               width);
      },
      rows,
      y);
}

template <typename T>
void combine_rows_backward(Stream stream,
                           const Plan& plan,
                           const T* grad,
                           const T* rows,
                           const at::opmath_type<T>* weights,
                           T* grad_rows,
                           at::opmath_type<T>* grad_weights,
                           int64_t width) {
  with_vector_size<T>(
      width,
      [&](auto size) {
        launch(stream,
               blocks_for(plan.num_rows()),
               kThreads,
               0,
               combine_rows_backward_kernel<T, decltype(size)::value>,
               plan,
               grad,
               rows,
               weights,
               grad_rows,
               grad_weights,
               width);
      },
      grad,
      rows,
      grad_rows);
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_INSTANTIATE_COMBINE(T, In) \
  template void combine_rows(               \
      Stream, const Plan&, const In*, const at::opmath_type<T>*, T*, int64_t);
#define TORCHMOE_INSTANTIATE(T, ...)                                     \
  TORCHMOE_INSTANTIATE_COMBINE(T, T)                                     \
  template void gather_rows(Stream, const Plan&, const T*, T*, int64_t); \
  template void combine_rows_backward(Stream,                            \
                                      const Plan&,                       \
                                      const T*,                          \
                                      const T*,                          \
                                      const at::opmath_type<T>*,         \
                                      T*,                                \
                                      at::opmath_type<T>*,               \
                                      int64_t);
#define TORCHMOE_INSTANTIATE_WIDE(T, ...) TORCHMOE_INSTANTIATE_COMBINE(T, at::opmath_type<T>)
TORCHMOE_FLOAT_TYPES(TORCHMOE_INSTANTIATE)
TORCHMOE_NARROW_TYPES(TORCHMOE_INSTANTIATE_WIDE)
#undef TORCHMOE_INSTANTIATE_WIDE
#undef TORCHMOE_INSTANTIATE
#undef TORCHMOE_INSTANTIATE_COMBINE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace torchmoe::cuda
