#include "cuda/gate_weights_kernel.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "common/vocabulary.h"
#include "cuda/device.h"
#include "ops/gate_weights.h"

namespace torchmoe {

namespace {

constexpr auto kOp = "gate_weights";

at::Tensor gate_weights_kernel(const at::Tensor& logits,
                               const at::Tensor& indices,
                               std::string_view score_function,
                               std::string_view normalize,
                               std::string_view estimator) {
  check_gate_weights(logits, indices, score_function, normalize, estimator);
  const cuda::OnDevice device(logits);
  const auto logits_c = logits.contiguous();
  const auto indices_c = indices.contiguous();
  const auto acc = accumulate_dtype(logits.scalar_type());
  auto weights = at::empty(indices.sizes(), logits.options().dtype(acc));
  with_float_type(logits.scalar_type(), [&]<typename scalar_t>() {
    cuda::gate_weights(device.stream(),
                       {logits.size(0), logits.size(1), indices.size(1)},
                       choose<ScoreFunction>(kOp, score_function),
                       choose<Normalize>(kOp, normalize),
                       logits_c.const_data_ptr<scalar_t>(),
                       indices_c.const_data_ptr<int64_t>(),
                       weights.mutable_data_ptr<at::opmath_type<scalar_t>>());
  });
  return weights;
}

at::Tensor gate_weights_backward_kernel(const at::Tensor& grad,
                                        const at::Tensor& logits,
                                        const at::Tensor& indices,
                                        std::string_view score_function,
                                        std::string_view normalize,
                                        std::string_view estimator) {
  check_gate_weights_backward(grad, logits, indices, score_function, normalize, estimator);
  const cuda::OnDevice device(logits);
  // Straight through, the normalisation counts as the identity: the gradient of normalize "none".
  const auto backward_normalize =
      choose<GateEstimator>(kOp, estimator) == GateEstimator::straight_through
          ? Normalize::none
          : choose<Normalize>(kOp, normalize);
  const auto grad_acc = contiguous_as(grad, accumulate_dtype(logits.scalar_type()));
  const auto logits_c = logits.contiguous();
  const auto indices_c = indices.contiguous();
  auto grad_logits = at::empty(logits.sizes(), logits.options());
  with_float_type(logits.scalar_type(), [&]<typename scalar_t>() {
    cuda::gate_weights_backward(device.stream(),
                                {logits.size(0), logits.size(1), indices.size(1)},
                                choose<ScoreFunction>(kOp, score_function),
                                backward_normalize,
                                grad_acc.const_data_ptr<at::opmath_type<scalar_t>>(),
                                logits_c.const_data_ptr<scalar_t>(),
                                indices_c.const_data_ptr<int64_t>(),
                                grad_logits.mutable_data_ptr<scalar_t>());
  });
  return grad_logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("gate_weights", &gate_weights_kernel);
  m.impl("_gate_weights_backward", &gate_weights_backward_kernel);
}

}  // namespace torchmoe
