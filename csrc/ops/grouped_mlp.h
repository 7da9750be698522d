#pragma once

#include <ATen/core/Tensor.h>

#include "expert_activation.h"
#include "expert_parameters.h"

namespace torchmoe {

/// Each expert's feed-forward network on its own rows, which are sorted already: expert_mlp without
/// dispatch, weights and combine. For expert_offsets[e] <= r < expert_offsets[e + 1]
///
///     out[r] = w_out[e] a + b_out[e],  a = activation(w_in[e] rows[r] + b_in[e])
///
/// and 0 for the rows from expert_offsets[E] on, which are not read.
///
/// rows [N, H]; expert_offsets [E + 1] int64, ascending within [0, N], the first one 0 -> [N, H] in
/// rows' dtype. The experts' dtype and orientation, and the derivatives, are as in expert_mlp, of
/// which this is a composition: with a plan in which row r is token r's only slot, of weight 1.
at::Tensor grouped_mlp(const at::Tensor& rows,
                       const ExpertParameters& experts,
                       const at::Tensor& expert_offsets,
                       const ExpertActivation& activation);

/// The same by way of expert_mlp's private part.
at::Tensor compose_grouped_mlp(const at::Tensor& rows,
                               const ExpertParameters& experts,
                               const at::Tensor& expert_offsets,
                               const ExpertActivation& activation);

void check_grouped_mlp(const at::Tensor& rows,
                       const ExpertParameters& experts,
                       const at::Tensor& expert_offsets,
                       const ExpertActivation& activation);

}  // namespace torchmoe
