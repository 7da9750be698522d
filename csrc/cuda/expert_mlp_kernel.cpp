// The experts' feed-forward networks: up-projection with gather and activation, down-projection,
// combine. Between them lie the activations [N, I] in x's type and the experts' outputs [N, H] in that of
// sums.
#include "cuda/expert_mlp_kernel.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/activation.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/orientation.h"
#include "common/output_mask.h"
#include "common/tensors.h"
#include "cuda/device.h"
#include "cuda/gemm/grouped_product.h"
#include "cuda/gemm/tile_map_tensors.h"
#include "cuda/plan_tensors.h"
#include "cuda/rows.h"
#include "ops/expert_mlp.h"

namespace torchmoe {

namespace {

/// Adds up the tokens' rows and rounds to the result's dtype: T, that of sums or a caller's own.
template <typename T, typename Acc = at::opmath_type<T>>
void combine_into(at::Tensor& result,
                  cuda::Stream stream,
                  const cuda::Plan& plan,
                  const Acc* rows,
                  const Acc* weights,
                  int64_t hidden) {
  if (result.scalar_type() == c10::CppTypeToScalarType<T>::value) {
    return cuda::combine_rows(stream, plan, rows, weights, result.mutable_data_ptr<T>(), hidden);
  }
  constexpr auto kWide = c10::CppTypeToScalarType<Acc>::value;
  auto sums = result.scalar_type() == kWide
                  ? result
                  : at::empty(result.sizes(), result.options().dtype(kWide));
  cuda::combine_rows(stream, plan, rows, weights, sums.template mutable_data_ptr<Acc>(), hidden);
  if (!sums.is_same(result)) {
    result.copy_(sums);
  }
}

std::tuple<at::Tensor, at::Tensor> expert_mlp_kernel(const at::Tensor& x,
                                                     const at::Tensor& weights,
                                                     const ExpertParameters& experts,
                                                     const DispatchPlan& plan,
                                                     bool save_pre,
                                                     const ExpertActivation& given_activation,
                                                     bool wide) {
  check_expert_mlp_forward(x, weights, experts, plan, given_activation);
  const cuda::OnDevice device(x);
  const auto stream = device.stream();
  const auto activation = choose_activation("expert_mlp", given_activation);
  const cuda::PlanTensors plan_c(plan);
  const auto num_rows = plan.row_to_slot.size(0);
  const auto hidden = experts.w_out.size(1);
  const auto intermediate = experts.w_out.size(2);
  const auto dtype = experts.w_in.scalar_type();
  const auto acc = accumulate_dtype(dtype);
  const auto stored = x.options().dtype(dtype);
  const auto x_c = contiguous_as(x, dtype);
  const auto weights_acc = contiguous_as(weights, acc);
  const auto w_in_c = oriented(experts.w_in);
  const auto b_in_c = contiguous(experts.b_in);
  const auto w_out_c = oriented(experts.w_out);
  const auto b_out_c = contiguous(experts.b_out);
  const auto tokens = at::empty({num_rows}, plan.row_to_slot.options());
  auto y = at::empty(x.sizes(), x.options().dtype(expert_mlp_result_dtype(x, experts, wide)));
  auto pre = at::empty({save_pre ? num_rows : 0, experts.w_in.size(1)}, stored);
  auto act = at::empty({num_rows, intermediate}, stored);
  auto rows = at::empty({num_rows, hidden}, x.options().dtype(acc));
  with_float_type(dtype, [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    const cuda::TileMapTensors tiles(stream,
                                     plan_c.expert_offsets(),
                                     num_rows,
                                     cuda::product_tile_rows<scalar_t>(),
                                     cuda::FirstRow::zero);
    const auto* weight_data = weights_acc.const_data_ptr<Acc>();
    auto* pre_data = save_pre ? pre.mutable_data_ptr<scalar_t>() : nullptr;
    Acc* no_row_weights = nullptr;
    cuda::read_plan_rows(
        stream, plan_c.plan(), weight_data, tokens.mutable_data_ptr<int64_t>(), no_row_weights);
    cuda::project_up<scalar_t>(
        stream,
        tiles.map(),
        {.activation = activation,
         .x = {x_c.const_data_ptr<scalar_t>(), tokens.const_data_ptr<int64_t>()},
         .w_in = matrices_of<const scalar_t>(w_in_c),
         .b_in = data_or_null<scalar_t>(b_in_c),
         .pre = pre_data,
         .act = act.mutable_data_ptr<scalar_t>(),
         .hidden = hidden,
         .intermediate = intermediate});
    if (save_pre) {
      cuda::zero_unrouted_rows(stream, tiles.map(), pre_data, experts.w_in.size(1));
    }
    cuda::grouped_linear(stream,
                         tiles.map(),
                         cuda::SourceRows<scalar_t>{act.const_data_ptr<scalar_t>()},
                         matrices_of<const scalar_t>(w_out_c),
                         data_or_null<scalar_t>(b_out_c),
                         rows.mutable_data_ptr<Acc>(),
                         intermediate,
                         hidden);
    combine_into<scalar_t>(
        y, stream, plan_c.plan(), rows.const_data_ptr<Acc>(), weight_data, hidden);
  });
  return {y, pre};
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
  const cuda::OnDevice device(x);
  const auto stream = device.stream();
  const ExpertMlpWanted wanted(output_mask);
  const bool want_pre = wanted.x || wanted.w_in || wanted.b_in;
  const auto activation = choose_activation("expert_mlp", given_activation);
  const cuda::PlanTensors plan_c(plan);
  const auto num_rows = plan.row_to_slot.size(0);
  const auto num_experts = experts.w_in.size(0);
  const auto hidden = experts.w_out.size(1);
  const auto intermediate = experts.w_out.size(2);
  const auto pre_width = experts.w_in.size(1);
  const auto dtype = experts.w_in.scalar_type();
  const auto acc = accumulate_dtype(dtype);
  const auto grad_c = contiguous_as(grad, dtype);
  const auto stored = x.options().dtype(dtype);
  const auto x_c = contiguous_as(x, dtype);
  const auto weights_acc = contiguous_as(weights, acc);
  const auto w_in_c = oriented(experts.w_in);
  const auto w_out_c = oriented(experts.w_out);
  const auto b_out_c = contiguous(experts.b_out);
  const auto pre_c = contiguous_as(pre, dtype);
  const auto tokens = at::empty({num_rows}, plan.row_to_slot.options());
  const auto row_weights = at::empty({num_rows}, x.options().dtype(acc));
  auto grad_x = empty_if(
      wanted.x, x.sym_sizes(), x.options().dtype(expert_mlp_result_dtype(x, experts, wide)));
  auto grad_weights = empty_if(wanted.weights, weights.sym_sizes(), row_weights.options());
  auto grad_w_in = empty_oriented_if(wanted.w_in, experts.w_in);
  auto grad_b_in = empty_if(wanted.b_in, {num_experts, pre_width}, stored);
  auto grad_w_out = empty_oriented_if(wanted.w_out, experts.w_out);
  auto grad_b_out = empty_if(wanted.b_out, {num_experts, hidden}, stored);
  auto weighted_act = empty_if(wanted.w_out, {num_rows, intermediate}, stored);
  auto grad_pre = empty_if(want_pre, {num_rows, pre_width}, stored);
  with_float_type(dtype, [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    const cuda::TileMapTensors tiles(stream,
                                     plan_c.expert_offsets(),
                                     num_rows,
                                     cuda::product_tile_rows<scalar_t>(),
                                     cuda::FirstRow::zero);
    const auto& map = tiles.map();
    const auto* grad_data = grad_c.const_data_ptr<scalar_t>();
    const auto* token_data = tokens.mutable_data_ptr<int64_t>();
    const cuda::SourceRows<scalar_t> grad_in{grad_data, token_data};
    const auto* row_weight_data = row_weights.mutable_data_ptr<Acc>();
    const Acc* unweighted = nullptr;
    cuda::read_plan_rows(stream,
                         plan_c.plan(),
                         weights_acc.const_data_ptr<Acc>(),
                         tokens.mutable_data_ptr<int64_t>(),
                         row_weights.mutable_data_ptr<Acc>());

    // 1. dA' = grad w_out, and through the activation.
    const at::Tensor dots =
        at::empty({num_rows, cuda::dot_parts<scalar_t>(intermediate)}, row_weights.options());
    auto* weighted_act_data = wanted.w_out ? weighted_act.mutable_data_ptr<scalar_t>() : nullptr;
    auto* grad_pre_data = want_pre ? grad_pre.mutable_data_ptr<scalar_t>() : nullptr;
    cuda::project_down_backward<scalar_t>(stream,
                                          map,
                                          {.activation = activation,
                                           .grad = grad_in,
                                           .w_out = matrices_of<const scalar_t>(w_out_c),
                                           .pre = pre_c.const_data_ptr<scalar_t>(),
                                           .row_weights = row_weight_data,
                                           .dots = dots.mutable_data_ptr<Acc>(),
                                           .weighted_act = weighted_act_data,
                                           .grad_pre = grad_pre_data,
                                           .hidden = hidden,
                                           .intermediate = intermediate});
    const cuda::SourceRows<scalar_t> grad_pre_in{grad_pre_data};
    if (wanted.weights) {
      cuda::finish_grad_weights<scalar_t>(stream,
                                          plan_c.plan(),
                                          map,
                                          {.dots = dots.const_data_ptr<Acc>(),
                                           .grad = grad_data,
                                           .b_out = data_or_null<scalar_t>(b_out_c),
                                           .grad_weights = grad_weights.mutable_data_ptr<Acc>(),
                                           .hidden = hidden,
                                           .intermediate = intermediate});
    }
    // 2. w_out and b_out: the weight is in the activation for the one, next to the row for the
    // other.
    if (wanted.w_out) {
      cuda::grouped_linear_grad_weight(stream,
                                       map,
                                       grad_in,
                                       cuda::SourceRows<scalar_t>{weighted_act_data},
                                       matrices_of<scalar_t>(grad_w_out),
                                       intermediate,
                                       hidden);
    }
    if (wanted.b_out) {
      cuda::grouped_linear_grad_bias(
          stream, map, grad_in, row_weight_data, grad_b_out.mutable_data_ptr<scalar_t>(), hidden);
    }
    // 3. w_in and b_in.
    if (wanted.w_in) {
      cuda::grouped_linear_grad_weight(
          stream,
          map,
          grad_pre_in,
          cuda::SourceRows<scalar_t>{x_c.const_data_ptr<scalar_t>(), token_data},
          matrices_of<scalar_t>(grad_w_in),
          hidden,
          pre_width);
    }
    if (wanted.b_in) {
      cuda::grouped_linear_grad_bias(
          stream, map, grad_pre_in, unweighted, grad_b_in.mutable_data_ptr<scalar_t>(), pre_width);
    }
    // 4. x: each slot's share of its gradient, then their sum.
    if (wanted.x) {
      auto rows = at::empty({num_rows, hidden}, row_weights.options());
      cuda::grouped_linear_grad_rows(stream,
                                     map,
                                     grad_pre_in,
                                     matrices_of<const scalar_t>(w_in_c),
                                     rows.mutable_data_ptr<Acc>(),
                                     hidden,
                                     pre_width);
      combine_into<scalar_t>(
          grad_x, stream, plan_c.plan(), rows.const_data_ptr<Acc>(), unweighted, hidden);
    }
  });
  return {
      grad_x, grad_weights.to(weights.scalar_type()), grad_w_in, grad_b_in, grad_w_out, grad_b_out};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("_expert_mlp", with_records<&expert_mlp_kernel>);
  m.impl("_expert_mlp_backward", with_records<&expert_mlp_backward_kernel>);
}

}  // namespace torchmoe
