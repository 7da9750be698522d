#pragma once

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// A copy of x that carries `loss` in its graph: backward passes x's gradient on unchanged and
/// gives loss the gradient `scale`, whatever gradient arrives at x. The effect is that of adding
/// scale * loss to the objective, for code that can return only one tensor.
///
/// A gradient scaler multiplies the objective, so pass its factor as `scale`. x floating, loss a
/// floating scalar -> a tensor like x. Differentiable in x and loss. Every backward pass through
/// the copy gives loss its gradient, including a pass through the graph of a gradient. That is
/// right for an objective with a penalty on its gradient. For a Hessian-vector product add the loss
/// instead. A loss with a tangent is refused, since the result has no place for it.
at::Tensor attach_loss(const at::Tensor& x, const at::Tensor& loss, double scale = 1.0);

void check_attach_loss(const at::Tensor& x, const at::Tensor& loss);

}  // namespace torchmoe
