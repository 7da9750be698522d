// The experts' feed-forward networks, stage by stage over rows in expert order: gather, product,
// activation, product, combine.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/activation.h"
#include "common/dtypes.h"
#include "common/output_mask.h"
#include "common/tensors.h"
#include "cpu/activate_rows.h"
#include "cpu/gemm/grouped_product.h"
#include "cpu/parallel.h"
#include "cpu/plan_reader.h"
#include "cpu/rows.h"
#include "ops/expert_mlp.h"

namespace torchmoe {

namespace {

struct Shape {
  int64_t hidden;
  int64_t intermediate;
  int64_t pre_width;
};

Shape shape_of(const at::Tensor& w_in, const at::Tensor& w_out) {
  return {w_out.size(1), w_out.size(2), w_in.size(1)};
}

/// For the routed rows, with dA' = grad w_out (the weight not yet in) in grad_act:
///
///     weight's gradient  <dA', a> + <grad, b_out>
///     weighted_act       weight * a                  for w_out's gradient
///     grad_pre           weight * dA' * da/dpre
///
/// grad_act becomes weighted_act in place.
template <typename T>
void activation_backward_rows(Activation activation,
                              const PlanView& plan,
                              const T* pre,
                              const T* weights,
                              T* grad_act,
                              T* grad_pre,
                              T* grad_weights,
                              const Shape& shape) {
  const bool gated = is_gated(activation);
  with_nonlinearity(activation, [&](auto f) {
    cpu::parallel_items(plan.num_routed, shape.pre_width, [&](int64_t begin, int64_t end) {
      std::vector<T> act(shape.intermediate);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t slot = plan.slot_of(r);
        const T weight = slot < 0 ? T(0) : weights[slot];
        const T* gate = pre + r * shape.pre_width;
        const T* up = gate + shape.intermediate;
        T* d_act = grad_act + r * shape.intermediate;
        T* d_gate = grad_pre + r * shape.pre_width;
        T* d_up = d_gate + shape.intermediate;
        for (int64_t i = 0; i < shape.intermediate; ++i) {
          const auto [value, slope] = activate_with_slope<f()>(gate[i]);
          const T d = weight * d_act[i];
          if (gated) {
            act[i] = value * up[i];
            d_gate[i] = d * up[i] * slope;
            d_up[i] = d * value;
          } else {
            act[i] = value;
            d_gate[i] = d * slope;
          }
        }
        if (slot >= 0) {
          grad_weights[slot] = cpu::dot<T>(d_act, act.data(), shape.intermediate);
        }
        std::transform(act.begin(), act.end(), d_act, [weight](T value) { return weight * value; });
      }
    });
  });
}

/// For routed rows: adds <grad, b_out[e]> to the weights' gradients (nothing where b_out is null)
/// and turns the gathered gradients into weight * grad.
template <typename T>
void weigh_grad_rows(const cpu::Offsets& offsets,
                     const PlanView& plan,
                     const T* b_out,
                     const T* weights,
                     T* grad_rows,
                     T* grad_weights,
                     int64_t hidden) {
  const auto num_experts = static_cast<int64_t>(offsets.size()) - 1;
  cpu::parallel_tasks(num_experts, [&](int64_t e) {
    for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
      const int64_t slot = plan.slot_of(r);
      if (slot < 0) {
        continue;
      }
      T* g = grad_rows + r * hidden;
      if (b_out != nullptr) {
        grad_weights[slot] += cpu::dot<T>(g, b_out + e * hidden, hidden);
      }
      std::transform(
          g, g + hidden, g, [weight = weights[slot]](T value) { return weight * value; });
    }
  });
}

std::tuple<at::Tensor, at::Tensor> expert_mlp_kernel(const at::Tensor& x,
                                                     const at::Tensor& weights,
                                                     const at::Tensor& w_in,
                                                     const std::optional<at::Tensor>& b_in,
                                                     const at::Tensor& w_out,
                                                     const std::optional<at::Tensor>& b_out,
                                                     const at::Tensor& expert_offsets,
                                                     const at::Tensor& row_to_slot,
                                                     const at::Tensor& slot_to_row,
                                                     std::string_view activation_name,
                                                     bool save_pre) {
  check_expert_mlp(
      x, slot_to_row, "slot_to_row", weights, w_in, b_in, w_out, b_out, activation_name);
  check_expert_mlp_plan("expert_mlp", x, w_in, expert_offsets, row_to_slot, slot_to_row);
  const auto activation = choose_activation("expert_mlp", activation_name);
  const cpu::PlanReader plan(expert_offsets, row_to_slot, slot_to_row);
  const auto shape = shape_of(w_in, w_out);
  const auto num_rows = row_to_slot.size(0);
  const auto dtype = x.scalar_type();
  const auto acc = accumulate_dtype(dtype);
  const auto x_acc = contiguous_as(x, acc);
  const auto weights_acc = contiguous_as(weights, acc);
  const auto w_in_acc = contiguous_as(w_in, acc);
  const auto b_in_acc = contiguous_as(b_in, acc);
  const auto w_out_acc = contiguous_as(w_out, acc);
  const auto b_out_acc = contiguous_as(b_out, acc);
  const auto options = x.options().dtype(acc);
  auto y = at::empty(x.sizes(), options);
  auto pre = at::empty({num_rows, shape.pre_width}, options);
  auto rows = at::empty({num_rows, shape.hidden}, options);
  auto act = at::empty({num_rows, shape.intermediate}, options);
  AT_DISPATCH_FLOATING_TYPES(acc, "expert_mlp", [&] {
    auto* pre_data = pre.mutable_data_ptr<scalar_t>();
    auto* row_data = rows.mutable_data_ptr<scalar_t>();
    auto* act_data = act.mutable_data_ptr<scalar_t>();
    const auto view = plan.view();
    cpu::gather_rows(view, x_acc.const_data_ptr<scalar_t>(), row_data, shape.hidden);
    std::fill(pre_data + view.num_routed * shape.pre_width,
              pre_data + num_rows * shape.pre_width,
              scalar_t(0));
    cpu::grouped_linear(plan.offsets(),
                        row_data,
                        w_in_acc.const_data_ptr<scalar_t>(),
                        data_or_null<scalar_t>(b_in_acc),
                        pre_data,
                        shape.hidden,
                        shape.pre_width);
    cpu::activate_rows(activation, pre_data, act_data, view.num_routed, shape.intermediate);
    // The gathered tokens have served; their memory takes the experts' outputs.
    cpu::grouped_linear(plan.offsets(),
                        act_data,
                        w_out_acc.const_data_ptr<scalar_t>(),
                        data_or_null<scalar_t>(b_out_acc),
                        row_data,
                        shape.intermediate,
                        shape.hidden);
    cpu::combine_rows(view,
                      row_data,
                      weights_acc.const_data_ptr<scalar_t>(),
                      y.mutable_data_ptr<scalar_t>(),
                      shape.hidden);
  });
  return {y.to(dtype), save_pre ? pre.to(dtype) : at::empty({0, shape.pre_width}, x.options())};
}

ExpertMlpGradients expert_mlp_backward_kernel(const at::Tensor& grad,
                                              const at::Tensor& x,
                                              const at::Tensor& weights,
                                              const at::Tensor& w_in,
                                              const std::optional<at::Tensor>& b_in,
                                              const at::Tensor& w_out,
                                              const std::optional<at::Tensor>& b_out,
                                              const at::Tensor& expert_offsets,
                                              const at::Tensor& row_to_slot,
                                              const at::Tensor& slot_to_row,
                                              const at::Tensor& pre,
                                              std::string_view activation_name,
                                              std::array<bool, 6> output_mask) {
  check_expert_mlp_backward(
      grad, x, slot_to_row, weights, w_in, b_in, w_out, b_out, pre, activation_name);
  check_expert_mlp_plan("_expert_mlp_backward", x, w_in, expert_offsets, row_to_slot, slot_to_row);
  const auto [want_x, want_weights, want_w_in, want_b_in, want_w_out, want_b_out] = output_mask;
  const auto activation = choose_activation("expert_mlp", activation_name);
  const cpu::PlanReader plan(expert_offsets, row_to_slot, slot_to_row);
  const auto& offsets = plan.offsets();
  const auto shape = shape_of(w_in, w_out);
  const auto num_rows = row_to_slot.size(0);
  const auto num_experts = w_in.size(0);
  const auto dtype = x.scalar_type();
  const auto acc = accumulate_dtype(dtype);
  const auto grad_acc = contiguous_as(grad, acc);
  const auto x_acc = contiguous_as(x, acc);
  const auto weights_acc = contiguous_as(weights, acc);
  const auto w_in_acc = contiguous_as(w_in, acc);
  const auto w_out_acc = contiguous_as(w_out, acc);
  const auto b_out_acc = contiguous_as(b_out, acc);
  const auto pre_acc = contiguous_as(pre, acc);
  const auto options = x.options().dtype(acc);
  auto grad_x = empty_if(want_x, x.sym_sizes(), options);
  auto grad_weights = at::zeros(weights.sizes(), options);
  auto grad_w_in = empty_if(want_w_in, w_in.sym_sizes(), options);
  auto grad_b_in = empty_if(want_b_in, {num_experts, shape.pre_width}, options);
  auto grad_w_out = empty_if(want_w_out, w_out.sym_sizes(), options);
  auto grad_b_out = empty_if(want_b_out, {num_experts, shape.hidden}, options);
  auto rows = at::empty({num_rows, shape.hidden}, options);
  auto act = at::empty({num_rows, shape.intermediate}, options);
  auto grad_pre = at::empty({num_rows, shape.pre_width}, options);
  AT_DISPATCH_FLOATING_TYPES(acc, "expert_mlp_backward", [&] {
    const auto view = plan.view();
    const auto* weight_data = weights_acc.const_data_ptr<scalar_t>();
    auto* row_data = rows.mutable_data_ptr<scalar_t>();
    auto* act_data = act.mutable_data_ptr<scalar_t>();
    auto* grad_pre_data = grad_pre.mutable_data_ptr<scalar_t>();
    auto* grad_weight_data = grad_weights.mutable_data_ptr<scalar_t>();

    // 1. dA' = grad w_out, then through the activation.
    cpu::gather_rows(view, grad_acc.const_data_ptr<scalar_t>(), row_data, shape.hidden);
    cpu::grouped_linear_grad_rows(offsets,
                                  row_data,
                                  w_out_acc.const_data_ptr<scalar_t>(),
                                  act_data,
                                  shape.intermediate,
                                  shape.hidden);
    activation_backward_rows(activation,
                             view,
                             pre_acc.const_data_ptr<scalar_t>(),
                             weight_data,
                             act_data,
                             grad_pre_data,
                             grad_weight_data,
                             shape);
    // 2. w_out and b_out: the weight sits in the activation for the one, in the gradient's rows for
    // the other.
    if (want_w_out) {
      cpu::grouped_linear_grad_weight(offsets,
                                      row_data,
                                      act_data,
                                      grad_w_out.mutable_data_ptr<scalar_t>(),
                                      shape.intermediate,
                                      shape.hidden);
    }
    if (b_out_acc || want_b_out) {
      weigh_grad_rows(offsets,
                      view,
                      data_or_null<scalar_t>(b_out_acc),
                      weight_data,
                      row_data,
                      grad_weight_data,
                      shape.hidden);
    }
    if (want_b_out) {
      cpu::grouped_linear_grad_bias(
          offsets, row_data, grad_b_out.mutable_data_ptr<scalar_t>(), shape.hidden);
    }
    // 3. w_in and b_in; the rows now hold the tokens.
    if (want_w_in) {
      cpu::gather_rows(view, x_acc.const_data_ptr<scalar_t>(), row_data, shape.hidden);
      cpu::grouped_linear_grad_weight(offsets,
                                      grad_pre_data,
                                      row_data,
                                      grad_w_in.mutable_data_ptr<scalar_t>(),
                                      shape.hidden,
                                      shape.pre_width);
    }
    if (want_b_in) {
      cpu::grouped_linear_grad_bias(
          offsets, grad_pre_data, grad_b_in.mutable_data_ptr<scalar_t>(), shape.pre_width);
    }
    // 4. x; the rows now hold each slot's share of its gradient.
    if (want_x) {
      cpu::grouped_linear_grad_rows(offsets,
                                    grad_pre_data,
                                    w_in_acc.const_data_ptr<scalar_t>(),
                                    row_data,
                                    shape.hidden,
                                    shape.pre_width);
      const scalar_t* unweighted = nullptr;
      cpu::combine_rows(
          view, row_data, unweighted, grad_x.mutable_data_ptr<scalar_t>(), shape.hidden);
    }
  });
  return {grad_x.to(dtype),
          want_weights ? grad_weights.to(weights.scalar_type()) : at::empty({0}, weights.options()),
          grad_w_in.to(dtype),
          grad_b_in.to(dtype),
          grad_w_out.to(dtype),
          grad_b_out.to(dtype)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CPU, m) {
  m.impl("_expert_mlp", &expert_mlp_kernel);
  m.impl("_expert_mlp_backward", &expert_mlp_backward_kernel);
}

}  // namespace torchmoe
