// y = sum_j w_j rows_j is linear in rows and in weights, so that its derivatives of every order are
// the op and its backward again.
#include "ops/unpermute.h"

#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/tangents.h"

namespace torchmoe {

namespace {

variable_list unpermute_gradients(const Arriving& arriving,
                                  const at::Tensor& rows,
                                  const at::Tensor& weights,
                                  const DispatchPlan& plan) {
  auto [grad_rows, grad_weights] = unpermute_backward(arriving.grads[0], rows, weights, plan);
  return {grad_rows, grad_weights};
}

at::Tensor unpermute_autograd(const at::Tensor& rows,
                              const at::Tensor& weights,
                              const DispatchPlan& plan) {
  check_unpermute(rows, weights, plan);
  const auto y = below_autograd([&] { return unpermute(rows, weights, plan); });
  record_node<&unpermute_gradients>("unpermute", {y}, std::tie(rows, weights), rows, weights, plan);
  at::Tensor tangent;
  if (has_tangent(rows)) {
    add_term(tangent, unpermute(tangent_of(rows), primal_of(weights), plan));
  }
  if (has_tangent(weights)) {
    add_term(tangent, unpermute(primal_of(rows), tangent_of(weights), plan));
  }
  set_tangent(y, tangent);
  return y;
}

// With v and c the gradients arriving at grad_rows = w (P g) and grad_weights = <P g, rows>, P g
// being g in expert order: dg = unpermute(v, w) + unpermute(rows, c), drows = c (P g), dw = <P g,
// v>.
variable_list unpermute_second_gradients(const Arriving& arriving,
                                         const at::Tensor& grad,
                                         const at::Tensor& rows,
                                         const at::Tensor& weights,
                                         const DispatchPlan& plan) {
  const auto& v = arriving.grads[0];
  const auto& c = arriving.grads[1];
  at::Tensor grad_grad, grad_rows, grad_weights;
  if (v.defined()) {
    if (arriving.wanted[0]) {
      add_term(grad_grad, unpermute(v, weights, plan));
    }
    if (arriving.wanted[2]) {
      grad_weights = std::get<1>(unpermute_backward(grad, v, weights, plan));
    }
  }
  if (c.defined()) {
    if (arriving.wanted[0]) {
      add_term(grad_grad, unpermute(rows, c, plan));
    }
    if (arriving.wanted[1]) {
      grad_rows = std::get<0>(unpermute_backward(grad, rows, c, plan));
    }
  }
  return {grad_grad, grad_rows, grad_weights};
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward_autograd(const at::Tensor& grad,
                                                               const at::Tensor& rows,
                                                               const at::Tensor& weights,
                                                               const DispatchPlan& plan) {
  check_unpermute_backward(grad, rows, weights, plan);
  auto results = below_autograd([&] { return unpermute_backward(grad, rows, weights, plan); });
  const auto& [grad_rows, grad_weights] = results;
  record_node<&unpermute_second_gradients>("unpermute_backward",
                                           {grad_rows, grad_weights},
                                           std::tie(grad, rows, weights),
                                           grad,
                                           rows,
                                           weights,
                                           plan);
  if (has_tangent(grad, rows, weights)) {
    const auto g = primal_of(grad), r = primal_of(rows), w = primal_of(weights);
    at::Tensor rows_tangent, weights_tangent;
    if (has_tangent(grad)) {
      auto [by_rows, by_weights] = unpermute_backward(tangent_of(grad), r, w, plan);
      add_term(rows_tangent, by_rows);
      add_term(weights_tangent, by_weights);
    }
    if (has_tangent(rows)) {
      add_term(weights_tangent, std::get<1>(unpermute_backward(g, tangent_of(rows), w, plan)));
    }
    if (has_tangent(weights)) {
      add_term(rows_tangent, std::get<0>(unpermute_backward(g, r, tangent_of(weights), plan)));
    }
    set_tangent(grad_rows, rows_tangent);
    set_tangent(grad_weights, weights_tangent);
  }
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("unpermute", with_records<&unpermute_autograd>);
  m.impl("_unpermute_backward", with_records<&unpermute_backward_autograd>);
}

}  // namespace torchmoe
