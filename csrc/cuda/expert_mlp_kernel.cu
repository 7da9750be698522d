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

/// What an activation is formed of: its pre-activation; a gate and a value, which lie in two halves;
/// these as Gating says; or these alternating.
enum class Inputs { one, halves, shaped_halves, neighbours };

constexpr bool is_shaped(Inputs inputs) {
  return inputs == Inputs::shaped_halves || inputs == Inputs::neighbours;
}

constexpr Columns columns_of(Inputs inputs) {
  return inputs == Inputs::one          ? Columns::single
         : inputs == Inputs::neighbours ? Columns::neighbours
                                        : Columns::halves;
}

/// Activations in a tile: half of its columns where each is made of two.
template <typename T, Inputs inputs>
constexpr int kTileActivations =
    inputs == Inputs::one ? Engine<T>::kColumns : Engine<T>::kColumns / 2;

/// The pre-activations of a group of activations; up is of gated ones.
template <typename Acc>
struct PreGroup {
  Vector<Acc, kGroupSize> gate;
  Vector<Acc, kGroupSize> up;
};

/// The same from two groups in which they alternate, and the other way round.
template <typename Acc>
__device__ PreGroup<Acc> separated(const Vector<Acc, kGroupSize>& low,
                                   const Vector<Acc, kGroupSize>& high) {
  PreGroup<Acc> group;
#pragma unroll
  for (int n = 0; n < kGroupSize; ++n) {
    const auto& from = n < kGroupSize / 2 ? low : high;
    group.gate.values[n] = from.values[2 * n % kGroupSize];
    group.up.values[n] = from.values[2 * n % kGroupSize + 1];
  }
  return group;
}

template <typename Acc>
__device__ Vector<Acc, kGroupSize> alternating(const PreGroup<Acc>& group, int first) {
  Vector<Acc, kGroupSize> result;
#pragma unroll
  for (int n = 0; n < kGroupSize; ++n) {
    const int i = first + n / 2;
    result.values[n] = n % 2 == 0 ? group.gate.values[i] : group.up.values[i];
  }
  return result;
}

/// Reads the pre-activations of the activations from column i on, of which there are `count`, from a
/// row of P numbers.
template <Inputs inputs, typename T, typename Acc>
__device__ PreGroup<Acc> read_pre(
    const T* row, int64_t i, int64_t count, int64_t intermediate, bool aligned) {
  if constexpr (inputs == Inputs::neighbours) {
    const T* from = row + 2 * i;
    return separated(read_group<T, Acc>(from, 2 * count, aligned),
                     read_group<T, Acc>(from + kGroupSize, 2 * count - kGroupSize, aligned));
  } else {
    PreGroup<Acc> group;
    group.gate = read_group<T, Acc>(row + i, count, aligned);
    if constexpr (inputs != Inputs::one) {
      group.up = read_group<T, Acc>(row + intermediate + i, count, aligned);
    }
    return group;
  }
}

template <Inputs inputs, typename T, typename Acc>
__device__ void write_pre(T* row,
                          const PreGroup<Acc>& group,
                          int64_t i,
                          int64_t count,
                          int64_t intermediate,
                          bool aligned) {
  if constexpr (inputs == Inputs::neighbours) {
    T* to = row + 2 * i;
    write_group(to, alternating(group, 0), 2 * count, aligned);
    write_group(
        to + kGroupSize, alternating(group, kGroupSize / 2), 2 * count - kGroupSize, aligned);
  } else {
    write_group(row + i, group.gate, count, aligned);
    if constexpr (inputs != Inputs::one) {
      write_group(row + intermediate + i, group.up, count, aligned);
    }
  }
}

/// Calls body with the activation's formula, a function of a gate, and of a value too if it is gated.
template <Inputs inputs, typename Body>
__device__ void with_formula(Nonlinearity f, const Body& body) {
  if constexpr (inputs == Inputs::one) {
    with_nonlinearity(f, body);
  } else if constexpr (is_shaped(inputs)) {
    with_gate<ShapedGate>(f, body);
  } else {
    with_gate<PlainGate>(f, body);
  }
}

/// Rounds a tile's pre-activations into `pre` and applies the activation to them while they are at
/// hand. For a gated expert the tile holds the gates next to the values they belong to.
template <typename T, Inputs inputs>
struct Activate {
  using Acc = typename Engine<T>::Acc;
  Nonlinearity f;
  Gating gating;
  const T* b_in;
  T* pre;
  T* act;
  int64_t intermediate;
  bool pre_aligned;
  bool act_aligned;

  __device__ void operator()(const ResultTile& tile, const Acc* sums) const {
    with_formula<inputs>(f, [&](auto formula) { this->apply(formula, tile, sums); });
  }

  template <typename F>
  __device__ void apply(F formula, const ResultTile& tile, const Acc* sums) const {
    constexpr int columns = kTileActivations<T, inputs>;
    const int64_t pre_width = inputs == Inputs::one ? intermediate : 2 * intermediate;
    for_each_group<Engine<T>, columns>([&](int r, int c) {
      const int64_t row = tile.begin + r;
      const int64_t i = tile.first_column + c;
      const int64_t count = intermediate - i;
      if (row >= tile.end || count <= 0) {
        return;
      }
      PreGroup<Acc> group = read_tile(sums, r, c);
      if (b_in != nullptr) {
        const auto bias = read_pre<inputs, T, Acc>(
            b_in + tile.expert * pre_width, i, count, intermediate, /*aligned=*/false);
#pragma unroll
        for (int n = 0; n < kGroupSize; ++n) {
          group.gate.values[n] += bias.gate.values[n];
          if constexpr (inputs != Inputs::one) {
            group.up.values[n] += bias.up.values[n];
          }
        }
      }
      if (pre != nullptr) {
        write_pre<inputs>(pre + row * pre_width, group, i, count, intermediate, pre_aligned);
      }
      if (act != nullptr) {
        Vector<Acc, kGroupSize> result;
#pragma unroll
        for (int n = 0; n < kGroupSize; ++n) {
          if constexpr (inputs == Inputs::one) {
            result.values[n] = formula.value(group.gate.values[n]);
          } else {
            result.values[n] = formula.value(gating, group.gate.values[n], group.up.values[n]);
          }
        }
        write_group(act + row * intermediate + i, result, count, act_aligned);
      }
    });
  }

  /// The sums of the activations from column c on.
  __device__ static PreGroup<Acc> read_tile(const Acc* sums, int r, int c) {
    if constexpr (inputs == Inputs::neighbours) {
      return separated(read_sums<Engine<T>>(sums, r, 2 * c),
                       read_sums<Engine<T>>(sums, r, 2 * c + kGroupSize));
    } else {
      PreGroup<Acc> group;
      group.gate = read_sums<Engine<T>>(sums, r, c);
      if constexpr (inputs != Inputs::one) {
        group.up = read_sums<Engine<T>>(sums, r, kTileActivations<T, inputs> + c);
      }
      return group;
    }
  }
};

/// Takes a tile of dA' through the activation.
template <typename T, Inputs inputs>
struct ActivateBackward {
  using Acc = typename Engine<T>::Acc;

  Nonlinearity f;
  Gating gating;
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
    with_formula<inputs>(f, [&](auto formula) { this->apply(formula, tile, sums); });
  }

  template <typename F>
  __device__ void apply(F formula, const ResultTile& tile, const Acc* sums) const {
    constexpr int lanes_per_row = Engine<T>::kColumns / kGroupSize;
    for_each_group<Engine<T>>([&](int r, int c) {
      const int64_t row = tile.begin + r;
      const int64_t i = tile.first_column + c;
      Acc dot = 0;
      if (row < tile.end && i < intermediate) {
        dot = group_backward(formula, row, i, read_sums<Engine<T>>(sums, r, c));
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
  group_backward(F formula, int64_t row, int64_t i, const Vector<Acc, kGroupSize>& grad_act) const {
    const int64_t pre_width = inputs == Inputs::one ? intermediate : 2 * intermediate;
    const int64_t count = intermediate - i;
    const auto group =
        read_pre<inputs, T, Acc>(pre + row * pre_width, i, count, intermediate, pre_aligned);
    const Acc weight = row_weights == nullptr ? Acc(1) : row_weights[row];
    Vector<Acc, kGroupSize> act;
    PreGroup<Acc> grads;
    Acc dot = 0;
#pragma unroll
    for (int n = 0; n < kGroupSize; ++n) {
      const Acc weighted = weight * grad_act.values[n];
      if constexpr (inputs == Inputs::one) {
        const auto [value, slope] = formula.with_slope(group.gate.values[n]);
        act.values[n] = value;
        grads.gate.values[n] = weighted * slope;
      } else {
        const auto [value, by_gate, by_up] =
            formula.with_slopes(gating, group.gate.values[n], group.up.values[n]);
        act.values[n] = value;
        grads.gate.values[n] = weighted * by_gate;
        grads.up.values[n] = weighted * by_up;
      }
      dot += grad_act.values[n] * act.values[n];  // 0 past the last column, as grad_act is there
      act.values[n] *= weight;
    }
    if (weighted_act != nullptr) {
      write_group(weighted_act + row * intermediate + i, act, count, act_aligned);
    }
    if (grad_pre != nullptr) {
      write_pre<inputs>(
          grad_pre + row * pre_width, grads, i, count, intermediate, grad_pre_aligned);
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

/// Calls body with the activation's inputs as a constant.
template <typename Body>
void with_inputs(const ChosenActivation& activation, const Body& body) {
  if (!activation.is_gated()) {
    body.template operator()<Inputs::one>();
  } else if (activation.is_interleaved()) {
    body.template operator()<Inputs::neighbours>();
  } else if (activation.gating.is_plain) {
    body.template operator()<Inputs::halves>();
  } else {
    body.template operator()<Inputs::shaped_halves>();
  }
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
  const auto& activation = step.activation;
  with_inputs(activation, [&]<Inputs inputs>() {
    run_rows_product<columns_of(inputs)>(
        stream,
        map,
        step.x.data,
        step.x.sources,
        step.w_in,
        step.hidden,
        inputs == Inputs::one ? step.intermediate : 2 * step.intermediate,
        Activate<T, inputs>{activation.f(),
                            activation.gating,
                            step.b_in,
                            step.pre,
                            step.act,
                            step.intermediate,
                            allows_vectors(step.pre, step.intermediate),
                            allows_vectors(step.act, step.intermediate)});
  });
}

template <typename T>
int64_t dot_parts(int64_t intermediate) {
  return (intermediate + Engine<T>::kColumns - 1) / Engine<T>::kColumns;
}

template <typename T>
void project_down_backward(Stream stream, const TileMap& map, const ProjectDownBackward<T>& step) {
  const auto& activation = step.activation;
  with_inputs(activation, [&]<Inputs inputs>() {
    run_rows_product<Columns::single>(
        stream,
        map,
        step.grad.data,
        step.grad.sources,
        step.w_out.transpose(),
        step.hidden,
        step.intermediate,
        ActivateBackward<T, inputs>{activation.f(),
                                    activation.gating,
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
  });
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
