// The derivatives of out = rows W^T + b, for every op that is one: it is linear in each of rows, W
// and b, so that its derivatives of every order are the op and its backward again.
#pragma once

#include <array>
#include <optional>
#include <tuple>

#include "autograd/node.h"
#include "autograd/tangents.h"

namespace torchmoe {

/// What a Layer has, Plan being what an op takes after rows, W and b:
///
///     kName
///     out(rows, W, b, plan...)                 the op
///     gradients(grad, rows, W, plan..., mask)  its backward: of rows, W and b
///     biases(c, rows, plan...)                 the row of c that is the bias of each row
///     check, check_gradients                   of both
template <typename Layer, typename... Plan>
class Affine {
 public:
  using Mask = std::array<bool, 3>;
  using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

  static at::Tensor out(const at::Tensor& rows,
                        const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias,
                        Plan... plan) {
    Layer::check(rows, weight, bias, plan...);
    const auto out = below_autograd([&] { return Layer::out(rows, weight, bias, plan...); });
    record_node<&first>(Layer::kName, {out}, std::tie(rows, weight, bias), rows, weight, plan...);
    at::Tensor tangent;
    if (has_tangent(rows)) {
      add_term(tangent, Layer::out(tangent_of(rows), primal_of(weight), std::nullopt, plan...));
    }
    if (has_tangent(weight)) {
      add_term(tangent, Layer::out(primal_of(rows), tangent_of(weight), std::nullopt, plan...));
    }
    if (has_tangent(bias)) {
      add_term(tangent, Layer::biases(tangent_of(*bias), out, plan...));
    }
    set_tangent(out, tangent);
    return out;
  }

  static Gradients gradients(const at::Tensor& grad,
                             const at::Tensor& rows,
                             const at::Tensor& weight,
                             Plan... plan,
                             Mask mask) {
    Layer::check_gradients(grad, rows, weight, plan...);
    auto results =
        below_autograd([&] { return Layer::gradients(grad, rows, weight, plan..., mask); });
    const auto& [grad_rows, grad_weight, grad_bias] = results;
    record_node<&second>(Layer::kName,
                         {grad_rows, grad_weight, grad_bias},
                         std::tie(grad, rows, weight),
                         grad,
                         rows,
                         weight,
                         plan...);
    std::array<at::Tensor, 3> tangents;
    const auto add_terms =
        [&](const at::Tensor& g, const at::Tensor& r, const at::Tensor& w, const Mask& depends) {
          const Mask wanted{mask[0] && depends[0], mask[1] && depends[1], mask[2] && depends[2]};
          const auto [by_rows, by_weight, by_bias] = Layer::gradients(g, r, w, plan..., wanted);
          const std::array terms{by_rows, by_weight, by_bias};
          for (size_t i = 0; i < terms.size(); ++i) {
            if (wanted[i]) {
              add_term(tangents[i], terms[i]);
            }
          }
        };
    if (has_tangent(grad)) {
      add_terms(tangent_of(grad), primal_of(rows), primal_of(weight), {true, true, true});
    }
    if (has_tangent(rows)) {
      add_terms(primal_of(grad), tangent_of(rows), primal_of(weight), {false, true, false});
    }
    if (has_tangent(weight)) {
      add_terms(primal_of(grad), primal_of(rows), tangent_of(weight), {true, false, false});
    }
    set_tangent(grad_rows, tangents[0]);
    set_tangent(grad_weight, tangents[1]);
    set_tangent(grad_bias, tangents[2]);
    return results;
  }

 private:
  static variable_list first(const Arriving& arriving,
                             const at::Tensor& rows,
                             const at::Tensor& weight,
                             Plan... plan) {
    const Mask mask{arriving.wanted[0], arriving.wanted[1], arriving.wanted[2]};
    const auto [by_rows, by_weight, by_bias] =
        Layer::gradients(arriving.grads[0], rows, weight, plan..., mask);
    return {gradient_if(mask[0], by_rows),
            gradient_if(mask[1], by_weight),
            gradient_if(mask[2], by_bias)};
  }

  /// With v, V and c the gradients that arrive at G W, G^T rows and 1^T G: dG = v W^T + rows V^T +
  /// c, drows = G V, dW = G^T v.
  static variable_list second(const Arriving& arriving,
                              const at::Tensor& grad,
                              const at::Tensor& rows,
                              const at::Tensor& weight,
                              Plan... plan) {
    const auto& by_rows = arriving.grads[0];
    const auto& by_weight = arriving.grads[1];
    const auto& by_bias = arriving.grads[2];
    at::Tensor grad_grad, grad_rows, grad_weight;
    if (arriving.wanted[0]) {
      if (by_rows.defined()) {
        add_term(grad_grad, Layer::out(by_rows, weight, std::nullopt, plan...));
      }
      if (by_weight.defined()) {
        add_term(grad_grad, Layer::out(rows, by_weight, std::nullopt, plan...));
      }
      if (by_bias.defined()) {
        add_term(grad_grad, Layer::biases(by_bias, grad, plan...));
      }
    }
    if (arriving.wanted[1] && by_weight.defined()) {
      grad_rows =
          std::get<0>(Layer::gradients(grad, rows, by_weight, plan..., Mask{true, false, false}));
    }
    if (arriving.wanted[2] && by_rows.defined()) {
      grad_weight =
          std::get<1>(Layer::gradients(grad, by_rows, weight, plan..., Mask{false, true, false}));
    }
    return {grad_grad, grad_rows, grad_weight};
  }
};

}  // namespace torchmoe
