#pragma once

#include <ATen/core/Tensor.h>

namespace torchmoe {

/// A copy of x that carries `loss` in its graph: backward passes x's gradient on unchanged and
/// gives loss the gradient `scale`, whatever arrives at x. It stands for adding scale * loss to the
/// objective where only a tensor can be returned.
///
/// A gradient scaler multiplies the objective, so give its factor as `scale` too. x floating, loss
/// a floating scalar -> a tensor like x. Differentiable in x and loss. Every backward pass that comes
/// through the copy gives loss its gradient, one through a gradient's own graph as well: right for
/// an objective with a penalty on its gradient, and not for a Hessian-vector product, which is to
/// take a loss that is added. A loss with a tangent is refused, since the result has no place for
/// it.
at::Tensor attach_loss(const at::Tensor& x, const at::Tensor& loss, double scale = 1.0);

void check_attach_loss(const at::Tensor& x, const at::Tensor& loss);

}  // namespace torchmoe
