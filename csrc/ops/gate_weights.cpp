#include "ops/gate_weights.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/vocabulary.h"

namespace torchmoe {

at::Tensor gate_weights(const at::Tensor& logits,
                        const at::Tensor& indices,
                        std::string_view score_function,
                        std::string_view normalize,
                        std::string_view estimator) {
  static const auto op = find_op<decltype(gate_weights)>("torchmoe::gate_weights");
  return op.call(logits, indices, score_function, normalize, estimator);
}

at::Tensor gate_weights_backward(const at::Tensor& grad,
                                 const at::Tensor& logits,
                                 const at::Tensor& indices,
                                 std::string_view score_function,
                                 std::string_view normalize,
                                 std::string_view estimator) {
  static const auto op =
      find_op<decltype(gate_weights_backward)>("torchmoe::_gate_weights_backward");
  return op.call(grad, logits, indices, score_function, normalize, estimator);
}

void check_gate_weights(const at::Tensor& logits,
                        const at::Tensor& indices,
                        std::string_view score_function,
                        std::string_view normalize,
                        std::string_view estimator) {
  constexpr auto op = "gate_weights";
  check_dim(op, "logits", logits, 2, "[num_tokens, num_experts]");
  check_floating(op, "logits", logits);
  check_dim(op, "indices", indices, 2, "[num_tokens, top_k]");
  check_shape(
      op, "indices", indices, {logits.sym_size(0), indices.sym_size(1)}, "[num_tokens, top_k]");
  check_dtype(op, "indices", indices, at::kLong);
  check_same_device(op, "indices", indices, "logits", logits);
  choose<ScoreFunction>(op, score_function);
  choose<Normalize>(op, normalize);
  choose<GateEstimator>(op, estimator);
}

void check_gate_weights_backward(const at::Tensor& grad,
                                 const at::Tensor& logits,
                                 const at::Tensor& indices,
                                 std::string_view score_function,
                                 std::string_view normalize,
                                 std::string_view estimator) {
  check_gate_weights(logits, indices, score_function, normalize, estimator);
  constexpr auto op = "_gate_weights_backward";
  check_shape(op, "grad", grad, {indices.sym_size(0), indices.sym_size(1)}, "[num_tokens, top_k]");
  check_gradient(op, grad, "logits", logits);
}

namespace {

at::Tensor gate_weights_meta(const at::Tensor& logits,
                             const at::Tensor& indices,
                             std::string_view score_function,
                             std::string_view normalize,
                             std::string_view estimator) {
  check_gate_weights(logits, indices, score_function, normalize, estimator);
  return at::empty_symint(indices.sym_sizes(),
                          logits.options().dtype(accumulate_dtype(logits.scalar_type())));
}

at::Tensor gate_weights_backward_meta(const at::Tensor& grad,
                                      const at::Tensor& logits,
                                      const at::Tensor& indices,
                                      std::string_view score_function,
                                      std::string_view normalize,
                                      std::string_view estimator) {
  check_gate_weights_backward(grad, logits, indices, score_function, normalize, estimator);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Meta, m) {
  m.impl("gate_weights", &gate_weights_meta);
  m.impl("_gate_weights_backward", &gate_weights_backward_meta);
}

}  // namespace torchmoe
