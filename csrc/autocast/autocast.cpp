// What autocast does to each op: routing stays in float32 (float64 inputs stay), the experts'
// products run in the autocast type. permute, unpermute, sum_by_expert, scale_gradient and attach_loss
// take what they are given.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "common/find_op.h"
#include "ops/attach_dense_gradient.h"
#include "ops/expert_mlp.h"
#include "ops/gate_weights.h"
#include "ops/grouped_linear.h"
#include "ops/grouped_mlp.h"
#include "ops/load_balancing_loss.h"
#include "ops/router_logits.h"
#include "ops/router_z_loss.h"

namespace torchmoe {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

template <at::DeviceType device>
struct Autocast {
  /// Leaves autocast, so that the op called next is the op itself.
  struct Below {
    c10::impl::ExcludeDispatchKeyGuard guard{
        at::autocast::get_autocast_dispatch_key_from_device_type(device)};
  };

  template <typename MaybeTensor>
  static MaybeTensor wide(const MaybeTensor& tensor) {
    return at::autocast::cached_cast(at::kFloat, tensor, device);
  }

  template <typename MaybeTensor>
  static MaybeTensor narrow(const MaybeTensor& tensor) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
  }

  static ExpertParameters narrow(const ExpertParameters& experts) {
    return {
        narrow(experts.w_in), narrow(experts.b_in), narrow(experts.w_out), narrow(experts.b_out)};
  }

  static at::Tensor router_logits(const at::Tensor& x,
                                  const at::Tensor& weight,
                                  const OptionalTensor& bias) {
    const Below below;
    return torchmoe::router_logits(wide(x), wide(weight), wide(bias));
  }

  static at::Tensor gate_weights(const at::Tensor& logits,
                                 const at::Tensor& indices,
                                 std::string_view score_function,
                                 std::string_view normalize,
                                 std::string_view estimator) {
    const Below below;
    return torchmoe::gate_weights(wide(logits), indices, score_function, normalize, estimator);
  }

  static at::Tensor grouped_linear(const at::Tensor& rows,
                                   const at::Tensor& weight,
                                   const OptionalTensor& bias,
                                   const at::Tensor& expert_offsets) {
    const Below below;
    return torchmoe::grouped_linear(narrow(rows), narrow(weight), narrow(bias), expert_offsets);
  }

  static at::Tensor expert_mlp(const at::Tensor& x,
                               const at::Tensor& indices,
                               const at::Tensor& weights,
                               const ExpertParameters& experts,
                               const ExpertActivation& activation) {
    const Below below;
    return torchmoe::expert_mlp(narrow(x), indices, wide(weights), narrow(experts), activation);
  }

  static at::Tensor grouped_mlp(const at::Tensor& rows,
                                const ExpertParameters& experts,
                                const at::Tensor& expert_offsets,
                                const ExpertActivation& activation) {
    const Below below;
    return torchmoe::grouped_mlp(narrow(rows), narrow(experts), expert_offsets, activation);
  }

  static at::Tensor attach_dense_gradient(const at::Tensor& y,
                                          const at::Tensor& probs,
                                          const at::Tensor& x,
                                          const ExpertParameters& experts,
                                          const ExpertActivation& activation) {
    const Below below;
    return torchmoe::attach_dense_gradient(y, wide(probs), narrow(x), narrow(experts), activation);
  }

  static at::Tensor load_balancing_loss(const at::Tensor& logits,
                                        const at::Tensor& fraction,
                                        std::string_view score_function,
                                        const OptionalTensor& token_mask) {
    const Below below;
    return torchmoe::load_balancing_loss(wide(logits), wide(fraction), score_function, token_mask);
  }

  static at::Tensor router_z_loss(const at::Tensor& logits, const OptionalTensor& token_mask) {
    const Below below;
    return torchmoe::router_z_loss(wide(logits), token_mask);
  }

  static void register_all(torch::Library& m) {
    m.impl("router_logits", &router_logits);
    m.impl("gate_weights", &gate_weights);
    m.impl("grouped_linear", &grouped_linear);
    m.impl("expert_mlp", with_records<&expert_mlp>);
    m.impl("grouped_mlp", with_records<&grouped_mlp>);
    m.impl("attach_dense_gradient", with_records<&attach_dense_gradient>);
    m.impl("load_balancing_loss", &load_balancing_loss);
    m.impl("router_z_loss", &router_z_loss);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, AutocastCPU, m) {
  Autocast<at::kCPU>::register_all(m);
}
TORCH_LIBRARY_IMPL(torchmoe, AutocastCUDA, m) {
  Autocast<at::kCUDA>::register_all(m);
}

}  // namespace torchmoe
