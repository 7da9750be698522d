// y = sum_j w_j rows_j is linear in rows and in weights, so that its derivatives of every order are
// the op and its backward again.
#include "ops/unpermute.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/add.h>
#include <torch/library.h>

#include "autograd/forward_mode.h"
#include "autograd/needed_gradients.h"
#include "autograd/saved_records.h"
#include "common/find_op.h"

namespace torchmoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class UnpermuteBackward : public torch::autograd::Function<UnpermuteBackward> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx,
                               const at::Tensor& grad,
                               const at::Tensor& rows,
                               const at::Tensor& weights,
                               const at::Tensor& expert_offsets,
                               const at::Tensor& row_to_slot,
                               const at::Tensor& slot_to_row) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad, rows, weights, expert_offsets, row_to_slot, slot_to_row});
    auto [grad_rows, grad_weights] =
        unpermute_backward(grad, rows, weights, {expert_offsets, row_to_slot, slot_to_row});
    return {grad_rows, grad_weights};
  }

  // With v and c the gradients arriving at grad_rows = w (P g) and grad_weights = <P g, rows>, P g
  // being g in expert order: dg = unpermute(v, w) + unpermute(rows, c), drows = c (P g), dw = <P g,
  // v>.
  static variable_list backward(AutogradContext* ctx, const variable_list& arriving) {
    const auto saved = ctx->get_saved_variables();
    const auto &grad = saved[0], &rows = saved[1], &weights = saved[2];
    const auto plan = saved_plan(saved, 3);
    NeededGradients needed(ctx);
    at::Tensor grad_grad, grad_rows, grad_weights;
    if (needed.next()) {
      grad_grad =
          at::add(unpermute(arriving[0], weights, plan), unpermute(rows, arriving[1], plan));
    }
    if (needed.next()) {
      grad_rows = std::get<0>(unpermute_backward(grad, rows, arriving[1], plan));
    }
    if (needed.next()) {
      grad_weights = std::get<1>(unpermute_backward(grad, arriving[0], weights, plan));
    }
    return {grad_grad, grad_rows, grad_weights, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

class Unpermute : public torch::autograd::Function<Unpermute> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& rows,
                            const at::Tensor& weights,
                            const at::Tensor& expert_offsets,
                            const at::Tensor& row_to_slot,
                            const at::Tensor& slot_to_row) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({rows, weights, expert_offsets, row_to_slot, slot_to_row});
    return unpermute(rows, weights, {expert_offsets, row_to_slot, slot_to_row});
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_rows, grad_weights] =
        unpermute_backward(grads[0], saved[0], saved[1], saved_plan(saved, 2));
    return {grad_rows, grad_weights, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor unpermute_autograd(const at::Tensor& rows,
                              const at::Tensor& weights,
                              const DispatchPlan& plan) {
  check_unpermute(rows, weights, plan);
  refuse_tangents("unpermute", rows, weights);
  return Unpermute::apply(rows, weights, plan.expert_offsets, plan.row_to_slot, plan.slot_to_row);
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward_autograd(const at::Tensor& grad,
                                                               const at::Tensor& rows,
                                                               const at::Tensor& weights,
                                                               const DispatchPlan& plan) {
  check_unpermute_backward(grad, rows, weights, plan);
  refuse_tangents("unpermute", grad, rows, weights);
  const auto grads = UnpermuteBackward::apply(
      grad, rows, weights, plan.expert_offsets, plan.row_to_slot, plan.slot_to_row);
  return {grads[0], grads[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("unpermute", with_records<&unpermute_autograd>);
  m.impl("_unpermute_backward", with_records<&unpermute_backward_autograd>);
}

}  // namespace torchmoe
