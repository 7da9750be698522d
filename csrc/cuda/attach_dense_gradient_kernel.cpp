// Every expert once for every token, and nothing kept of it except one scalar each: a plan in which
// every token chooses every expert, taken through expert_mlp's own kernels a block of tokens at a
// time.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/activation.h"
#include "common/dtypes.h"
#include "common/find_op.h"
#include "common/orientation.h"
#include "common/tensors.h"
#include "cuda/device.h"
#include "cuda/expert_mlp_kernel.h"
#include "cuda/gemm/grouped_product.h"
#include "cuda/gemm/tile_map_tensors.h"
#include "cuda/plan_tensors.h"
#include "ops/attach_dense_gradient.h"
#include "ops/dispatch_plan.h"

namespace torchmoe {

namespace {

// Rows in a block: enough to fill every multiprocessor, few enough that their pre-activations take
// a fraction of what a training step keeps.
constexpr int64_t kBlockRows = 65536;

at::Tensor attach_dense_gradient_backward_kernel(const at::Tensor& grad,
                                                 const at::Tensor& x,
                                                 const ExpertParameters& experts,
                                                 const ExpertActivation& given_activation) {
  check_attach_dense_gradient_backward(grad, x, experts, given_activation);
  const cuda::OnDevice device(x);
  const auto stream = device.stream();
  const auto activation = choose_activation("attach_dense_gradient", given_activation);
  const int64_t num_tokens = x.size(0);
  const int64_t num_experts = experts.w_out.size(0);
  const int64_t hidden = experts.w_out.size(1);
  const int64_t intermediate = experts.w_out.size(2);
  const auto dtype = experts.w_in.scalar_type();
  const auto acc = accumulate_dtype(dtype);
  const auto grad_c = contiguous_as(grad, dtype);
  const auto stored = x.options().dtype(dtype);
  const auto x_c = contiguous_as(x, dtype);
  const auto w_in_c = oriented(experts.w_in);
  const auto b_in_c = contiguous(experts.b_in);
  const auto w_out_c = oriented(experts.w_out);
  const auto b_out_c = contiguous(experts.b_out);
  const auto int_options = x.options().dtype(at::kLong);
  const auto acc_options = x.options().dtype(acc);
  auto grad_probs = at::empty({num_tokens, num_experts}, acc_options);
  if (grad_probs.numel() == 0) {
    return grad_probs;
  }
  const int64_t block_tokens = std::min(num_tokens, std::max<int64_t>(1, kBlockRows / num_experts));
  const int64_t block_rows = block_tokens * num_experts;
  const auto every_expert = at::arange(num_experts, int_options);
  const auto tokens = at::empty({block_rows}, int_options);
  const auto pre = at::empty({block_rows, experts.w_in.size(1)}, stored);
  with_float_type(dtype, [&]<typename scalar_t>() {
    using Acc = at::opmath_type<scalar_t>;
    const Acc* unweighted = nullptr;
    Acc* no_row_weights = nullptr;
    const at::Tensor dots =
        at::empty({block_rows, cuda::dot_parts<scalar_t>(intermediate)}, acc_options);
    for (int64_t begin = 0; begin < num_tokens; begin += block_tokens) {
      const int64_t count = std::min(block_tokens, num_tokens - begin);
      const auto all = dispatch_plan(every_expert.expand({count, num_experts}), num_experts);
      const cuda::PlanTensors plan_c(all);
      const cuda::TileMapTensors tiles(stream,
                                       plan_c.expert_offsets(),
                                       count * num_experts,
                                       cuda::product_tile_rows<scalar_t>(),
                                       cuda::FirstRow::zero);
      const auto* x_data = x_c.const_data_ptr<scalar_t>() + begin * hidden;
      const auto* grad_data = grad_c.const_data_ptr<scalar_t>() + begin * hidden;
      cuda::read_plan_rows(
          stream, plan_c.plan(), unweighted, tokens.mutable_data_ptr<int64_t>(), no_row_weights);
      cuda::project_up<scalar_t>(stream,
                                 tiles.map(),
                                 {.activation = activation,
                                  .x = {x_data, tokens.const_data_ptr<int64_t>()},
                                  .w_in = matrices_of<const scalar_t>(w_in_c),
                                  .b_in = data_or_null<scalar_t>(b_in_c),
                                  .pre = pre.mutable_data_ptr<scalar_t>(),
                                  .act = nullptr,
                                  .hidden = hidden,
                                  .intermediate = intermediate});
      cuda::project_down_backward<scalar_t>(stream,
                                            tiles.map(),
                                            {.activation = activation,
                                             .grad = {grad_data, tokens.const_data_ptr<int64_t>()},
                                             .w_out = matrices_of<const scalar_t>(w_out_c),
                                             .pre = pre.const_data_ptr<scalar_t>(),
                                             .row_weights = nullptr,
                                             .dots = dots.mutable_data_ptr<Acc>(),
                                             .weighted_act = nullptr,
                                             .grad_pre = nullptr,
                                             .hidden = hidden,
                                             .intermediate = intermediate});
      cuda::finish_grad_weights<scalar_t>(
          stream,
          plan_c.plan(),
          tiles.map(),
          {.dots = dots.const_data_ptr<Acc>(),
           .grad = grad_data,
           .b_out = data_or_null<scalar_t>(b_out_c),
           .grad_weights = grad_probs.mutable_data_ptr<Acc>() + begin * num_experts,
           .hidden = hidden,
           .intermediate = intermediate});
    }
  });
  return grad_probs;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("_attach_dense_gradient_backward", with_records<&attach_dense_gradient_backward_kernel>);
}

}  // namespace torchmoe
