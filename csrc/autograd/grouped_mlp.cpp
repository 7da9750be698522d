#include "ops/grouped_mlp.h"

#include <torch/library.h>

#include "autograd/node.h"
#include "autograd/tangents.h"
#include "common/find_op.h"

namespace torchmoe {

namespace {

/// Its parts have the derivatives.
at::Tensor grouped_mlp_autograd(const at::Tensor& rows,
                                const ExpertParameters& experts,
                                const at::Tensor& expert_offsets,
                                const ExpertActivation& activation) {
  check_grouped_mlp(rows, experts, expert_offsets, activation);
  if (wants_gradient(rows, experts) || has_tangent(rows, experts)) {
    return compose_grouped_mlp(rows, experts, expert_offsets, activation);
  }
  return below_autograd([&] { return grouped_mlp(rows, experts, expert_offsets, activation); });
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, Autograd, m) {
  m.impl("grouped_mlp", with_records<&grouped_mlp_autograd>);
}

}  // namespace torchmoe
