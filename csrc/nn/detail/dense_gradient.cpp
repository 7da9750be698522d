#include "nn/detail/dense_gradient.h"

#include <utility>
#include <vector>

#include <ATen/autocast_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/custom_function.h>

#include "nn/experts.h"
#include "ops/attach_dense_gradient.h"

namespace torchmoe::nn {
namespace {

/// The autocast that is on when this is made, entered again by `Within`.
struct AutocastOf {
  explicit AutocastOf(at::DeviceType device)
      : device(device),
        enabled(at::autocast::is_autocast_enabled(device)),
        dtype(at::autocast::get_autocast_dtype(device)) {}

  at::DeviceType device;
  bool enabled;
  at::ScalarType dtype;
};

class Within {
 public:
  explicit Within(const AutocastOf& wanted) : before_(wanted.device) { set(wanted); }
  ~Within() { set(before_); }
  Within(const Within&) = delete;
  Within(Within&&) = delete;
  Within& operator=(const Within&) = delete;
  Within& operator=(Within&&) = delete;

 private:
  static void set(const AutocastOf& wanted) {
    at::autocast::set_autocast_enabled(wanted.device, wanted.enabled);
    at::autocast::set_autocast_dtype(wanted.device, wanted.dtype);
  }

  AutocastOf before_;
};

/// What the backward pass calls, as a node of torch's keeps what is no tensor.
struct CalledLater : torch::CustomClassHolder {
  CalledLater(ExpertFunction called, const AutocastOf& around)
      : experts(std::move(called)), autocast(around) {}

  ExpertFunction experts;
  AutocastOf autocast;
};

/// Calls every expert in the backward pass. Where a graph of that is wanted the calls make one, so
/// that further derivatives are those of what is computed here.
struct DenseGradient : torch::autograd::Function<DenseGradient> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx,
                            const at::Tensor& y,
                            const at::Tensor& probs,
                            const at::Tensor& x,
                            const c10::IValue& called_later) {
    ctx->save_for_backward({x, probs});
    ctx->saved_data["called_later"] = called_later;
    return y.clone();
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto& x = saved[0];
    const auto& probs = saved[1];
    const auto holder = ctx->saved_data["called_later"].toCapsule();
    const auto& called = static_cast<const CalledLater&>(*holder);
    const Within autocast(called.autocast);
    const auto grad = grads[0].to(probs.scalar_type());
    std::vector<at::Tensor> columns;
    for (int64_t i = 0; i < probs.size(1); ++i) {
      const auto ids = at::full({x.size(0), 1}, i, x.options().dtype(at::kLong));
      const auto output = called.experts(x, ids, at::ones(ids.sizes(), probs.options()));
      columns.push_back((grad * output).sum(1));
    }
    return {grads[0], at::stack(columns, 1).to(probs.scalar_type()), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor attach_dense_gradient_of(const ExpertFunction& experts,
                                    const at::Tensor& y,
                                    const at::Tensor& probs,
                                    const at::Tensor& x) {
  if (const auto* stacked = experts.exactly<ExpertsImpl>()) {
    return attach_dense_gradient(y, probs, x, stacked->weights(), stacked->options().activation());
  }
  return DenseGradient::apply(y,
                              probs,
                              x,
                              c10::IValue::make_capsule(c10::make_intrusive<CalledLater>(
                                  experts, AutocastOf(x.device().type()))));
}

}  // namespace torchmoe::nn
