// The experts' feed-forward networks. Tokens are gathered, weights packed and 16-bit values widened
// by the products as they read; the activation, forward and backward, works on a product's block
// while it is in the cache.
//
// A thread takes one expert through all of its products, so that what lies between them stays in its
// cache and exists for a few experts at a time. Threads without an expert help the others.
#include <algorithm>
#include <numeric>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/activation.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/orientation.h"
#include "common/output_mask.h"
#include "common/tensors.h"
#include "cpu/activation_block.h"
#include "cpu/empty_pages.h"
#include "cpu/expert_matrices.h"
#include "cpu/gemm/grouped_product.h"
#include "cpu/parallel.h"
#include "cpu/plan_reader.h"
#include "cpu/rows.h"
#include "ops/expert_mlp.h"

namespace torchmoe {

namespace {

static_assert(cpu::kFewestColumns % cpu::kDotColumns == 0);

using cpu::advance;
using cpu::ExpertMatrices;
using Shape = cpu::ExpertShape;

/// Adds up the tokens' rows and rounds to the result's dtype: T, that of sums or a caller's own.
template <typename T, typename Acc = at::opmath_type<T>>
void combine_into(
    at::Tensor& result, const PlanView& plan, const Acc* rows, const Acc* weights, int64_t width) {
  if (result.scalar_type() == c10::CppTypeToScalarType<T>::value) {
    return cpu::combine_rows(plan, rows, weights, result.mutable_data_ptr<T>(), width);
  }
  constexpr auto kWide = c10::CppTypeToScalarType<Acc>::value;
  auto sums = result.scalar_type() == kWide
                  ? result
                  : at::empty(result.sizes(), result.options().dtype(kWide));
  cpu::combine_rows(plan, rows, weights, sums.template mutable_data_ptr<Acc>(), width);
  if (!sums.is_same(result)) {
    result.copy_(sums);
  }
}

/// What the routed rows are made of; a row without a slot is a token of zeros with weight 0.
template <typename Acc>
struct RoutedRows {
  RoutedRows(const PlanView& plan, const Acc* slot_weights)
      : tokens(plan.num_routed), weights(plan.num_routed) {
    cpu::parallel_items(plan.num_routed, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t slot = plan.slot_of(r);
        tokens[r] = slot < 0 ? -1 : slot / plan.top_k;
        weights[r] = slot < 0 ? Acc(0) : slot_weights[slot];
      }
    });
  }

  std::vector<int64_t> tokens;
  std::vector<Acc> weights;
};

/// The experts in the order in which threads should open them, and how many have rows.
struct ExpertOrder {
  explicit ExpertOrder(const cpu::Offsets& offsets) : experts(offsets.size() - 1) {
    const auto rows = [&](int64_t e) { return offsets[e + 1] - offsets[e]; };
    std::iota(experts.begin(), experts.end(), 0);
    std::stable_sort(
        experts.begin(), experts.end(), [&](int64_t a, int64_t b) { return rows(a) > rows(b); });
    num_busy =
        std::count_if(experts.begin(), experts.end(), [&](int64_t e) { return rows(e) > 0; });
  }

  std::vector<int64_t> experts;  // the most rows first
  int64_t num_busy;
};

// Rows of what phases hand on lie this many elements further apart than they are wide: apart by a
// power of two they would share a few lines of the caches.
constexpr int64_t kSpacing = 16;

/// One expert's rows, as products over a single expert see them.
struct ExpertRows {
  int64_t first;
  cpu::Offsets offsets;  // {0, how many}

  int64_t count() const { return offsets.back(); }
};

ExpertRows rows_of(const cpu::Offsets& offsets, int64_t e) {
  return {offsets[e], {0, offsets[e + 1] - offsets[e]}};
}

/// What every expert's tasks share. `beside` is how many experts are processed at the same time.
struct Layer {
  ChosenActivation activation;
  Shape shape;
  int64_t beside;
};

/// One expert's tasks forward. pre [rows, P] is null if the pre-activation is not needed; out is
/// [rows, H].
template <typename T, typename Acc>
std::vector<cpu::Phase> forward_phases(const Layer& layer,
                                       const ExpertRows& rows,
                                       const cpu::Rows<T>& tokens,
                                       const ExpertMatrices<const T>& matrices,
                                       T* pre,
                                       Acc* out,
                                       cpu::Workspace& workspace) {
  const auto activation = layer.activation;
  const auto shape = layer.shape;
  const auto beside = layer.beside;
  const int64_t stride = shape.intermediate + kSpacing;
  T* act = workspace.group_rows.get<T>(rows.count() * stride);
  std::vector<cpu::Phase> phases(2);
  for (const auto& block : cpu::row_blocks(rows.offsets, shape.intermediate, beside)) {
    phases[0].push_back([=](cpu::Workspace& own) {
      const int64_t row = block.rows.begin;
      const int64_t column = block.columns.begin;
      const cpu::PreColumns columns(activation, column, shape.intermediate);
      T* pre_row = advance(pre, row * shape.pre_width);
      cpu::ActivationBlock<T, Acc> target{};
      target.rows = block.rows.size();
      target.columns = block.columns.size();
      target.pre_gate = advance(pre_row, columns.gate);
      target.pre_up = activation.is_gated() ? advance(pre_row, columns.up) : nullptr;
      target.pre_stride = shape.pre_width;
      target.act = act + row * stride + column;
      target.act_stride = stride;
      const cpu::InputColumns<T> input{matrices.w_in, matrices.b_in, column, shape.intermediate};
      cpu::activated_product(activation, tokens.from(row, 0), input, shape.hidden, target, own);
    });
  }
  cpu::grouped_linear(phases[1],
                      rows.offsets,
                      cpu::Rows<T>{act, stride},
                      cpu::Linear<T>{matrices.w_out, matrices.b_out},
                      out,
                      shape.intermediate,
                      shape.hidden,
                      beside);
  return phases;
}

std::tuple<at::Tensor, at::Tensor> expert_mlp_kernel(const at::Tensor& x,
                                                     const at::Tensor& weights,
                                                     const ExpertParameters& experts,
                                                     const DispatchPlan& plan,
                                                     bool save_pre,
                                                     const ExpertActivation& given_activation,
                                                     bool wide) {
  check_expert_mlp_forward(x, weights, experts, plan, given_activation);
  const auto activation = choose_activation("expert_mlp", given_activation);
  const cpu::PlanReader plan_c(plan);
  const auto shape = cpu::shape_of(experts);
  const auto num_rows = plan.row_to_slot.size(0);
  const auto dtype = experts.w_in.scalar_type();
  const auto options = x.options().dtype(accumulate_dtype(dtype));
  const auto x_c = contiguous_as(x, dtype);
  const auto weights_acc = contiguous_as(weights, accumulate_dtype(dtype));
  const auto experts_c = cpu::readable(experts);
  auto y = at::empty(x.sizes(), x.options().dtype(expert_mlp_result_dtype(x, experts, wide)));
  auto pre = cpu::empty_pages({save_pre ? num_rows : 0, shape.pre_width}, x.options().dtype(dtype));
  const auto rows = cpu::empty_pages({num_rows, shape.hidden}, options);
  with_float_type(dtype, [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    const auto view = plan_c.view();
    const auto* weight_data = weights_acc.const_data_ptr<Acc>();
    auto* row_data = rows.mutable_data_ptr<Acc>();
    scalar_t* pre_data = nullptr;
    if (save_pre) {
      pre_data = pre.mutable_data_ptr<scalar_t>();
      std::fill(pre_data + view.num_routed * shape.pre_width,
                pre_data + num_rows * shape.pre_width,
                scalar_t(0));
    }
    const RoutedRows<Acc> routed(view, weight_data);
    const auto matrices = cpu::matrices_of<scalar_t>(experts_c);
    const auto* x_data = x_c.const_data_ptr<scalar_t>();
    const ExpertOrder order(plan_c.offsets());
    const Layer layer{activation, shape, order.num_busy};
    const int64_t multiplications = view.num_routed * shape.multiplications();
    cpu::run_groups(order.num_busy, multiplications, [&](int64_t i, cpu::Workspace& workspace) {
      const int64_t e = order.experts[i];
      const auto expert_rows = rows_of(plan_c.offsets(), e);
      const int64_t first = expert_rows.first;
      return forward_phases(layer,
                            expert_rows,
                            cpu::Rows<scalar_t>{x_data, shape.hidden, routed.tokens.data() + first},
                            of_expert(matrices, e, shape),
                            advance(pre_data, first * shape.pre_width),
                            row_data + first * shape.hidden,
                            workspace);
    });
    combine_into<scalar_t>(y, view, row_data, weight_data, shape.hidden);
  });
  return {y, pre};
}

/// What one expert's rows bring to the backward pass.
template <typename T, typename Acc>
struct BackwardRows {
  cpu::Rows<T> tokens;
  cpu::Rows<T> grad;
  const Acc* weights;  // [rows]
  const T* pre;        // [rows, P]
};

/// Where one expert's gradients are written; null if one is not required.
template <typename T, typename Acc>
struct ExpertGradients {
  ExpertMatrices<T> matrices;
  Acc* rows;     // [rows, H], each row's share of x's gradient
  Acc* weights;  // [T, K], of all experts
};

/// One expert's tasks backward: dA' and through the activation; then the gradients of both matrices,
/// of the rows and of the weights, which need nothing of one another.
template <typename T, typename Acc>
std::vector<cpu::Phase> backward_phases(const Layer& layer,
                                        const PlanView& plan,
                                        const ExpertRows& rows,
                                        const BackwardRows<T, Acc>& given,
                                        const ExpertMatrices<const T>& matrices,
                                        const ExpertGradients<T, Acc>& gradients,
                                        cpu::Workspace& workspace) {
  const auto activation = layer.activation;
  const auto shape = layer.shape;
  const auto beside = layer.beside;
  const auto grad = given.grad;
  const auto* weights = given.weights;
  const auto* pre = given.pre;
  const bool gated = activation.is_gated();
  const auto blocks = cpu::row_blocks(rows.offsets, shape.intermediate, beside);
  const int64_t num_dots = cpu::dots_of(shape.intermediate);
  const int64_t act_stride = shape.intermediate + kSpacing;
  const int64_t pre_stride = shape.pre_width + kSpacing;
  Acc* dots = workspace.group_dots.get<Acc>(rows.count() * num_dots);
  T* weighted_act = workspace.group_rows.get<T>(rows.count() * (act_stride + pre_stride));
  T* grad_pre = weighted_act + rows.count() * act_stride;
  std::vector<cpu::Phase> phases(2);
  for (const auto& block : blocks) {
    phases[0].push_back([=](cpu::Workspace& own) {
      const int64_t row = block.rows.begin;
      const int64_t column = block.columns.begin;
      const cpu::ProductSizes sizes{block.rows.size(), block.columns.size(), shape.hidden};
      Acc* grad_act = own.gate.get<Acc>(sizes.m * sizes.n);
      cpu::times(grad.from(row, 0), matrices.w_out.from(0, column), sizes, grad_act, sizes.n, own);
      const cpu::PreColumns columns(activation, column, shape.intermediate);
      const T* pre_row = pre + row * shape.pre_width;
      T* grad_pre_row = grad_pre + row * pre_stride;
      cpu::ActivationBackwardBlock<T, Acc> target{};
      target.rows = sizes.m;
      target.columns = sizes.n;
      target.grad_act = grad_act;
      target.grad_act_stride = sizes.n;
      target.pre_gate = pre_row + columns.gate;
      target.pre_up = gated ? pre_row + columns.up : nullptr;
      target.pre_stride = shape.pre_width;
      target.step = columns.step;
      target.weights = weights + row;
      target.weighted_act = weighted_act + row * act_stride + column;
      target.act_stride = act_stride;
      target.grad_gate = grad_pre_row + columns.gate;
      target.grad_up = gated ? grad_pre_row + columns.up : nullptr;
      target.grad_pre_stride = pre_stride;
      target.dots = dots + row * num_dots + column / cpu::kDotColumns;
      target.dots_stride = num_dots;
      cpu::activate_block_backward(activation, target);
    });
  }
  auto& tasks = phases[1];
  const cpu::Rows<T> act_rows{weighted_act, act_stride};
  const cpu::Rows<T> grad_pre_rows{grad_pre, pre_stride};
  const auto [hidden, intermediate, pre_width] = shape;
  if (gradients.rows != nullptr) {
    cpu::grouped_linear_grad_rows(tasks,
                                  rows.offsets,
                                  grad_pre_rows,
                                  matrices.w_in,
                                  gradients.rows,
                                  hidden,
                                  pre_width,
                                  beside);
  }
  if (gradients.matrices.w_in.data != nullptr) {
    cpu::grouped_linear_grad_weight(tasks,
                                    rows.offsets,
                                    grad_pre_rows,
                                    given.tokens,
                                    gradients.matrices.w_in,
                                    hidden,
                                    pre_width,
                                    beside);
  }
  if (gradients.matrices.w_out.data != nullptr) {
    cpu::grouped_linear_grad_weight(tasks,
                                    rows.offsets,
                                    grad,
                                    act_rows,
                                    gradients.matrices.w_out,
                                    intermediate,
                                    hidden,
                                    beside);
  }
  if (gradients.matrices.b_in != nullptr) {
    const Acc* unweighted = nullptr;
    cpu::grouped_linear_grad_bias(
        tasks, rows.offsets, grad_pre_rows, unweighted, gradients.matrices.b_in, pre_width);
  }
  if (gradients.matrices.b_out != nullptr) {
    cpu::grouped_linear_grad_bias(
        tasks, rows.offsets, grad, weights, gradients.matrices.b_out, hidden);
  }
  // A weight's gradient: <dA', a> of all columns, and <grad, b_out>.
  for (const auto& block : cpu::row_blocks(rows.offsets, /*columns=*/1)) {
    tasks.push_back([=, first = rows.first, hidden = hidden](cpu::Workspace&) {
      for (int64_t r = block.rows.begin; r < block.rows.end; ++r) {
        const int64_t slot = plan.slot_of(first + r);
        if (slot < 0) {
          continue;
        }
        const Acc* of_row = dots + r * num_dots;
        gradients.weights[slot] = std::accumulate(of_row, of_row + num_dots, Acc(0));
        if (matrices.b_out != nullptr) {
          gradients.weights[slot] += cpu::dot<Acc>(grad.row(r), matrices.b_out, hidden);
        }
      }
    });
  }
  return phases;
}

ExpertMlpGradients expert_mlp_backward_kernel(const at::Tensor& grad,
                                              const at::Tensor& x,
                                              const at::Tensor& weights,
                                              const ExpertParameters& experts,
                                              const DispatchPlan& plan,
                                              const at::Tensor& pre,
                                              std::array<bool, 6> output_mask,
                                              const ExpertActivation& given_activation,
                                              bool wide) {
  check_expert_mlp_backward(grad, x, weights, experts, plan, pre, given_activation);
  const ExpertMlpWanted wanted(output_mask);
  const auto activation = choose_activation("expert_mlp", given_activation);
  const cpu::PlanReader plan_c(plan);
  const auto shape = cpu::shape_of(experts);
  const auto num_experts = experts.w_in.size(0);
  const auto dtype = experts.w_in.scalar_type();
  const auto options = x.options().dtype(accumulate_dtype(dtype));
  const auto grad_c = contiguous_as(grad, dtype);
  const auto x_c = contiguous_as(x, dtype);
  const auto weights_acc = contiguous_as(weights, accumulate_dtype(dtype));
  const auto experts_c = cpu::readable(experts);
  const auto pre_c = contiguous_as(pre, dtype);
  auto grad_x = empty_if(
      wanted.x, x.sym_sizes(), x.options().dtype(expert_mlp_result_dtype(x, experts, wide)));
  auto grad_weights = at::zeros(weights.sizes(), options);
  auto grad_w_in = cpu::in_large_pages(empty_oriented_if(wanted.w_in, experts.w_in));
  auto grad_b_in = empty_if(wanted.b_in, {num_experts, shape.pre_width}, experts.w_in.options());
  auto grad_w_out = cpu::in_large_pages(empty_oriented_if(wanted.w_out, experts.w_out));
  auto grad_b_out = empty_if(wanted.b_out, {num_experts, shape.hidden}, experts.w_out.options());
  const auto rows =
      cpu::empty_pages({wanted.x ? plan.row_to_slot.size(0) : 0, shape.hidden}, options);
  with_float_type(dtype, [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    const auto data_if = [](bool one, at::Tensor& tensor) {
      return one ? tensor.mutable_data_ptr<scalar_t>() : nullptr;
    };
    auto* row_data = wanted.x ? rows.mutable_data_ptr<Acc>() : nullptr;
    const auto view = plan_c.view();
    const RoutedRows<Acc> routed(view, weights_acc.const_data_ptr<Acc>());
    const auto matrices = cpu::matrices_of<scalar_t>(experts_c);
    const auto matrices_if = [](bool one, const at::Tensor& tensor) {
      return one ? matrices_of<scalar_t>(tensor) : Matrices<scalar_t>{};
    };
    const ExpertMatrices<scalar_t> matrix_gradients{matrices_if(wanted.w_in, grad_w_in),
                                                    data_if(wanted.b_in, grad_b_in),
                                                    matrices_if(wanted.w_out, grad_w_out),
                                                    data_if(wanted.b_out, grad_b_out)};
    const auto* x_data = x_c.const_data_ptr<scalar_t>();
    const auto* grad_data = grad_c.const_data_ptr<scalar_t>();
    const auto* pre_data = pre_c.const_data_ptr<scalar_t>();
    auto* grad_weight_data = grad_weights.mutable_data_ptr<Acc>();
    const ExpertOrder order(plan_c.offsets());
    const Layer layer{activation, shape, order.num_busy};
    // An idle expert's gradients are zeros, which its tasks write too.
    const int64_t work =
        2 * view.num_routed * shape.multiplications() + grad_w_in.numel() + grad_w_out.numel();
    cpu::run_groups(num_experts, work, [&](int64_t i, cpu::Workspace& workspace) {
      const int64_t e = order.experts[i];
      const auto expert_rows = rows_of(plan_c.offsets(), e);
      const int64_t first = expert_rows.first;
      const int64_t* tokens = routed.tokens.data() + first;
      return backward_phases(
          layer,
          view,
          expert_rows,
          BackwardRows<scalar_t, Acc>{.tokens = {x_data, shape.hidden, tokens},
                                      .grad = {grad_data, shape.hidden, tokens},
                                      .weights = routed.weights.data() + first,
                                      .pre = pre_data + first * shape.pre_width},
          of_expert(matrices, e, shape),
          ExpertGradients<scalar_t, Acc>{.matrices = of_expert(matrix_gradients, e, shape),
                                         .rows = advance(row_data, first * shape.hidden),
                                         .weights = grad_weight_data},
          workspace);
    });
    if (wanted.x) {
      const Acc* unweighted = nullptr;
      combine_into<scalar_t>(grad_x, view, row_data, unweighted, shape.hidden);
    }
  });
  return {
      grad_x,
      wanted.weights ? grad_weights.to(weights.scalar_type()) : at::empty({0}, weights.options()),
      grad_w_in,
      grad_b_in,
      grad_w_out,
      grad_b_out};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("_expert_mlp", with_records<&expert_mlp_kernel>);
  m.impl("_expert_mlp_backward", with_records<&expert_mlp_backward_kernel>);
}

}  // namespace torchmoe
