#include "cuda/expert_mlp_kernel.h"

#include "common/float_types.h"
#include "cuda/gemm/rows_product.h"

namespace torchmoe::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    read_plan_rows_kernel(Plan given, const Acc* weights, int64_t* tokens, Acc* row_weights) {
  const PlanView plan = given.view();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= plan.num_rows()) {
    return;
  }
  const int64_t slot = plan.slot_of(row);
  tokens[row] = slot < 0 ? -1 : slot / plan.top_k;
  if (row_weights != nullptr) {
    row_weights[row] = slot < 0 ? Acc(0) : weights[slot];
  }
}

/// Activations in a tile: half of its columns where the other half are the gates' values.
template <typename T, bool gated>
constexpr int kTileActivations = gated ? Engine<T>::kColumns / 2 : Engine<T>::kColumns;

/// Rounds a tile's pre-activations into `pre` and applies the activation to them while they are at
/// hand. For a gated expert the tile holds the gates next to the values they belong to.
template <typename T, bool gated>
struct Activate {
  Nonlinearity f;
  const T* b_in;
  T* pre;
  T* act;
  int64_t intermediate;
  bool pre_aligned;
  bool act_aligned;

  __device__ void operator()(const ResultTile& tile, const typename Engine<T>::Acc* sums) const {
    with_nonlinearity(f, [&](auto formula) { this->apply(formula, tile, sums); });
  }

  template <typename F>
  __device__ void apply(F f, const ResultTile& tile, const typename Engine<T>::Acc* sums) const {
    constexpr int columns = kTileActivations<T, gated>;
    const int64_t pre_width = gated ? 2 * intermediate : intermediate;
    for_each_group<Engine<T>, columns>([&](int r, int c) {
      const int64_t row = tile.begin + r;
      const int64_t i = tile.first_column + c;
      const int64_t count = intermediate - i;
      if (row >= tile.end || count <= 0) {
        return;
      }
      auto gate = read_sums<Engine<T>>(sums, r, c);
      const T* bias = b_in == nullptr ? nullptr : b_in + tile.expert * pre_width + i;
      add_bias(gate, bias, count);
      T* to = pre + row * pre_width + i;
      if (pre != nullptr) {
        write_group(to, gate, count, pre_aligned);
      }
#pragma unroll
      for (int n = 0; n < kGroupSize; ++n) {
        gate.values[n] = f.value(gate.values[n]);
      }
      if constexpr (gated) {
        auto up = read_sums<Engine<T>>(sums, r, columns + c);
        add_bias(up, bias == nullptr ? nullptr : bias + intermediate, count);
        if (pre != nullptr) {
          write_group(to + intermediate, up, count, pre_aligned);
        }
        for (int n = 0; n < kGroupSize; ++n) {
          gate.values[n] *= up.values[n];
        }
      }
      if (act != nullptr) {
        write_group(act + row * intermediate + i, gate, count, act_aligned);
      }
    });
  }
};

/// Takes a tile of dA' through the activation.
template <typename T, bool gated>
struct ActivateBackward {
  using Acc = typename Engine<T>::Acc;

  Nonlinearity f;
  const T* pre;
  const Acc* row_weights;
  Acc* dots;
  int64_t parts;
  T* weighted_act;
  T* grad_pre;
  int64_t intermediate;
  bool pre_aligned;
  bool grad_pre_aligned;
  bool act_aligned;

  __device__ void operator()(const ResultTile& tile, const Acc* sums) const {
    with_nonlinearity(f, [&](auto formula) { this->apply(formula, tile, sums); });
  }

  template <typename F>
  __device__ void apply(F f, const ResultTile& tile, const Acc* sums) const {
    constexpr int lanes_per_row = Engine<T>::kColumns / kGroupSize;
    for_each_group<Engine<T>>([&](int r, int c) {
      const int64_t row = tile.begin + r;
      const int64_t i = tile.first_column + c;
      Acc dot = 0;
      if (row < tile.end && i < intermediate) {
        dot = group_backward(f, row, i, read_sums<Engine<T>>(sums, r, c));
      }
      // A row's groups lie in neighbouring lanes; all lanes of the warp are here.
      for (int distance = lanes_per_row / 2; distance > 0; distance /= 2) {
        dot += __shfl_xor_sync(kAllLanes, dot, distance);
      }
      if (row < tile.end && c == 0) {
        dots[row * parts + tile.column_tile] = dot;
      }
    });
  }

  /// Writes the group's parts of the results and returns its part of <dA', a>.
  template <typename F>
  __device__ Acc
  group_backward(F f, int64_t row, int64_t i, const Vector<Acc, kGroupSize>& grad_act) const {
    const int64_t pre_width = gated ? 2 * intermediate : intermediate;
    const int64_t count = intermediate - i;
    const int64_t at = row * pre_width + i;
    const auto gate = read_group<T, Acc>(pre + at, count, pre_aligned);
    Vector<Acc, kGroupSize> up;
    if constexpr (gated) {
      up = read_group<T, Acc>(pre + at + intermediate, count, pre_aligned);
    }
    const Acc weight = row_weights == nullptr ? Acc(1) : row_weights[row];
    Vector<Acc, kGroupSize> act;
    Vector<Acc, kGroupSize> grad_gate;
    Vector<Acc, kGroupSize> grad_up;
    Acc dot = 0;
#pragma unroll
    for (int n = 0; n < kGroupSize; ++n) {
      const auto [value, slope] = f.with_slope(gate.values[n]);
      const Acc d = weight * grad_act.values[n];
      act.values[n] = gated ? value * up.values[n] : value;
      grad_gate.values[n] = gated ? d * up.values[n] * slope : d * slope;
      grad_up.values[n] = d * value;
      dot += grad_act.values[n] * act.values[n];  // 0 past the last column, as grad_act is there
      act.values[n] *= weight;
    }
    if (weighted_act != nullptr) {
      write_group(weighted_act + row * intermediate + i, act, count, act_aligned);
    }
    if (grad_pre != nullptr) {
      write_group(grad_pre + at, grad_gate, count, grad_pre_aligned);
      if constexpr (gated) {
        write_group(grad_pre + at + intermediate, grad_up, count, grad_pre_aligned);
      }
    }
    return dot;
  }
};

/// A warp for each slot.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish_grad_weights_kernel(Plan given,
                               TileMap map,
                               const at::opmath_type<T>* dots,
                               int64_t parts,
                               const T* grad,
                               const T* b_out,
                               at::opmath_type<T>* grad_weights,
                               int64_t hidden) {
  using Acc = at::opmath_type<T>;
  const PlanView plan = given.view();
  const int64_t slot = warp_in_grid();
  if (slot >= plan.num_rows()) {
    return;
  }
  const int64_t row = plan.row_of(slot);
  Acc sum = 0;
  if (row >= 0) {
    for (int64_t part = lane_id(); part < parts; part += kWarpSize) {
      sum += dots[row * parts + part];
    }
    if (b_out != nullptr) {
      const T* g = grad + slot / plan.top_k * hidden;
      const int64_t expert = last_start_before(map.offsets, map.num_experts, row);
      const T* b = b_out + expert * hidden;
      for (int64_t h = lane_id(); h < hidden; h += kWarpSize) {
        sum += static_cast<Acc>(g[h]) * static_cast<Acc>(b[h]);
      }
    }
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) {
    grad_weights[slot] = sum;
  }
}

template <typename T, bool gated>
void run_project_up(Stream stream, const TileMap& map, const ProjectUp<T>& step) {
  using Finish = Activate<T, gated>;
  const Finish finish{nonlinearity_of(step.activation),
                      step.b_in,
                      step.pre,
                      step.act,
                      step.intermediate,
                      allows_vectors(step.pre, step.intermediate),
                      allows_vectors(step.act, step.intermediate)};
  run_product(
      stream,
      RowsProduct<T, Contiguous::depth, Finish>{map,
                                                step.x.data,
                                                step.x.sources,
                                                step.w_in,
                                                step.hidden,
                                                gated ? 2 * step.intermediate : step.intermediate,
                                                allows_vectors(step.x.data, step.hidden),
                                                allows_vectors(step.w_in, step.hidden),
                                                kTileActivations<T, gated>,
                                                /*halves=*/gated,
                                                finish});
}

template <typename T, bool gated>
void run_project_down_backward(Stream stream,
                               const TileMap& map,
                               const ProjectDownBackward<T>& step) {
  run_rows_product<Contiguous::side>(
      stream,
      map,
      step.grad.data,
      step.grad.sources,
      step.w_out,
      step.hidden,
      step.intermediate,
      ActivateBackward<T, gated>{nonlinearity_of(step.activation),
                                 step.pre,
                                 step.row_weights,
                                 step.dots,
                                 dot_parts<T>(step.intermediate),
                                 step.weighted_act,
                                 step.grad_pre,
                                 step.intermediate,
                                 allows_vectors(step.pre, step.intermediate),
                                 allows_vectors(step.grad_pre, step.intermediate),
                                 allows_vectors(step.weighted_act, step.intermediate)});
}

}  // namespace

template <typename Acc>
void read_plan_rows(
    Stream stream, const Plan& plan, const Acc* weights, int64_t* tokens, Acc* row_weights) {
  launch(stream,
         (plan.num_rows() + kThreads - 1) / kThreads,
         kThreads,
         0,
         read_plan_rows_kernel<Acc>,
         plan,
         weights,
         tokens,
         row_weights);
}

template <typename T>
void project_up(Stream stream, const TileMap& map, const ProjectUp<T>& step) {
  const auto run = is_gated(step.activation) ? run_project_up<T, true> : run_project_up<T, false>;
  run(stream, map, step);
}

template <typename T>
int64_t dot_parts(int64_t intermediate) {
  return (intermediate + Engine<T>::kColumns - 1) / Engine<T>::kColumns;
}

template <typename T>
void project_down_backward(Stream stream, const TileMap& map, const ProjectDownBackward<T>& step) {
  const auto run = is_gated(step.activation) ? run_project_down_backward<T, true>
                                             : run_project_down_backward<T, false>;
  run(stream, map, step);
}

template <typename T>
void finish_grad_weights(Stream stream,
                         const Plan& plan,
                         const TileMap& map,
                         const FinishGradWeights<T>& step) {
  launch(stream,
         (plan.num_rows() + kWarps - 1) / kWarps,
         kThreads,
         0,
         finish_grad_weights_kernel<T>,
         plan,
         map,
         step.dots,
         dot_parts<T>(step.intermediate),
         step.grad,
         step.b_out,
         step.grad_weights,
         step.hidden);
}

template void read_plan_rows(Stream, const Plan&, const float*, int64_t*, float*);
template void read_plan_rows(Stream, const Plan&, const double*, int64_t*, double*);
// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot stand in parentheses.
#define TORCHMOE_INSTANTIATE(T, ...)                                                          \
  template void project_up(Stream, const TileMap&, const ProjectUp<T>&);                      \
  template int64_t dot_parts<T>(int64_t);                                                     \
  template void project_down_backward(Stream, const TileMap&, const ProjectDownBackward<T>&); \
  template void finish_grad_weights(                                                          \
      Stream, const Plan&, const TileMap&, const FinishGradWeights<T>&);
TORCHMOE_FLOAT_TYPES(TORCHMOE_INSTANTIATE)
#undef TORCHMOE_INSTANTIATE
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace torchmoe::cuda
