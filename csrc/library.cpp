// The table of contents: every op of torchmoe. Contracts are in ops/X.h, derivatives in
// autograd/X.cpp, kernels in cpu/X_kernel.cpp. Names starting with an underscore are the ops' own
// backward passes and private parts.
#include <torch/library.h>

#include "backend.h"

/// The fields of ExpertActivation, last in a schema.
#define TORCHMOE_ACTIVATION_ARGUMENTS                                            \
  "str activation, *, float alpha=1.0, float? limit=None, float up_offset=0.0, " \
  "float? gate_softcap=None, float? up_softcap=None, bool interleaved=False"

TORCH_LIBRARY(torchmoe, m) {
  // Logits
  m.def("router_logits(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "_router_logits_backward(Tensor grad, Tensor x, Tensor weight, bool[3] output_mask) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");

  // Decide: integers only
  m.def(
      "select_experts(Tensor scores, int top_k, *, Tensor? selection_bias=None, "
      "Tensor? token_mask=None, Tensor? tie_break=None) -> Tensor");
  m.def(
      "limit_capacity(Tensor indices, Tensor capacity, *, str order=\"choice\", "
      "Tensor? priority=None, str overflow=\"drop\", Tensor? scores=None, Tensor? backup=None, "
      "Tensor? tie_break=None) -> Tensor");

  // Weigh
  m.def(
      "gate_weights(Tensor logits, Tensor indices, *, str score_function, str normalize, "
      "str estimator) -> Tensor");
  m.def(
      "_gate_weights_backward(Tensor grad, Tensor logits, Tensor indices, *, str score_function, "
      "str normalize, str estimator) -> Tensor");

  // Dispatch
  m.def(
      "dispatch_plan(Tensor indices, SymInt num_experts) "
      "-> (Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row)");
  m.def(
      "permute(Tensor x, Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row) -> Tensor");
  m.def(
      "_permute_backward(Tensor grad, Tensor expert_offsets, Tensor row_to_slot, "
      "Tensor slot_to_row) -> Tensor");
  m.def(
      "unpermute(Tensor rows, Tensor weights, Tensor expert_offsets, Tensor row_to_slot, "
      "Tensor slot_to_row) -> Tensor");
  m.def(
      "_unpermute_backward(Tensor grad, Tensor rows, Tensor weights, Tensor expert_offsets, "
      "Tensor row_to_slot, Tensor slot_to_row) -> (Tensor grad_rows, Tensor grad_weights)");

  // Compute
  m.def(
      "grouped_linear(Tensor rows, Tensor weight, Tensor? bias, Tensor expert_offsets) -> Tensor");
  m.def(
      "_grouped_linear_backward(Tensor grad, Tensor rows, Tensor weight, Tensor expert_offsets, "
      "bool[3] output_mask) -> (Tensor grad_rows, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "expert_mlp(Tensor x, Tensor indices, Tensor weights, Tensor w_in, Tensor? b_in, "
      "Tensor w_out, Tensor? b_out, " TORCHMOE_ACTIVATION_ARGUMENTS ") -> Tensor");
  m.def(
      "_expert_mlp(Tensor x, Tensor weights, Tensor w_in, Tensor? b_in, Tensor w_out, "
      "Tensor? b_out, Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row, "
      "bool save_pre, " TORCHMOE_ACTIVATION_ARGUMENTS
      ", bool wide=False) "
      "-> (Tensor y, Tensor pre)");
  m.def(
      "_expert_mlp_backward(Tensor grad, Tensor x, Tensor weights, Tensor w_in, Tensor? b_in, "
      "Tensor w_out, Tensor? b_out, Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row, "
      "Tensor pre, bool[6] output_mask, " TORCHMOE_ACTIVATION_ARGUMENTS
      ", "
      "bool wide=False) -> (Tensor grad_x, "
      "Tensor grad_weights, Tensor grad_w_in, Tensor grad_b_in, Tensor grad_w_out, "
      "Tensor grad_b_out)");

  m.def(
      "grouped_mlp(Tensor rows, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, "
      "Tensor expert_offsets, " TORCHMOE_ACTIVATION_ARGUMENTS ") -> Tensor");
  m.def("sum_by_expert(Tensor rows, Tensor expert_offsets) -> Tensor");
  m.def("_sum_by_expert_backward(Tensor grad, Tensor expert_offsets, SymInt num_rows) -> Tensor");

  // Account
  m.def(
      "load_balancing_loss(Tensor logits, Tensor fraction, *, str score_function, "
      "Tensor? token_mask=None) -> Tensor");
  m.def(
      "_load_balancing_loss_backward(Tensor grad, Tensor logits, Tensor fraction, *, "
      "str score_function, Tensor? token_mask=None) -> Tensor");
  m.def("mean_over_tokens(Tensor values, *, Tensor? token_mask=None) -> Tensor");
  m.def(
      "_mean_over_tokens_backward(Tensor grad, SymInt num_tokens, *, Tensor? token_mask=None) "
      "-> Tensor");
  m.def("router_z_loss(Tensor logits, *, Tensor? token_mask=None) -> Tensor");
  m.def(
      "_router_z_loss_backward(Tensor grad, Tensor logits, *, Tensor? token_mask=None) -> Tensor");

  // Shape the gradient
  m.def("scale_gradient(Tensor x, Tensor scale) -> Tensor");
  m.def(
      "attach_dense_gradient(Tensor y, Tensor probs, Tensor x, Tensor w_in, Tensor? b_in, "
      "Tensor w_out, Tensor? b_out, " TORCHMOE_ACTIVATION_ARGUMENTS ") -> Tensor");
  m.def(
      "_attach_dense_gradient_backward(Tensor grad, Tensor x, Tensor w_in, Tensor? b_in, "
      "Tensor w_out, Tensor? b_out, " TORCHMOE_ACTIVATION_ARGUMENTS ") -> Tensor");
  m.def("attach_loss(Tensor x, Tensor loss, float scale=1.0) -> Tensor");

  // Remember
  m.def("cache_signatures(Tensor x, Tensor planes, Tensor? row_mask=None) -> Tensor");
  m.def(
      "cache_lookup(Tensor x, Tensor signatures, Tensor keys, Tensor key_signatures, Tensor order, "
      "float similarity) -> Tensor");
  m.def(
      "cache_insert(Tensor x, Tensor signatures, Tensor keys, Tensor key_signatures, "
      "Tensor last_used, Tensor uses, float similarity, str eviction) "
      "-> (Tensor row, Tensor last_used, Tensor uses)");

  // Words
  m.def("_vocabulary(str argument) -> (str[] names, str[] docs)");

  torchmoe::register_missing_backends(m);
}
