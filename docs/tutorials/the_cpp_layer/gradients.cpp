#include <cstdio>
#include <iostream>

#include <torch/torch.h>

#include <torchmoe/testing.h>
#include <torchmoe/torchmoe.h>

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

// [soft cap]
// Logits that cannot leave [-cap, cap]: cap tanh(x / cap).
struct SoftCap : torch::autograd::Function<SoftCap> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, double cap) {
    const auto y = cap * torch::tanh(x / cap);
    ctx->save_for_backward({y});
    ctx->saved_data["cap"] = cap;
    return y;
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    const auto y = ctx->get_saved_variables()[0];
    return {grads[0] * (1 - y * y), Tensor()};
  }
};
// [/soft cap]

// [mended]
struct MendedSoftCap : torch::autograd::Function<MendedSoftCap> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, double cap) {
    return SoftCap::forward(ctx, x, cap);
  }
  static tensor_list backward(AutogradContext* ctx, const tensor_list& grads) {
    const auto y = ctx->get_saved_variables()[0] / ctx->saved_data["cap"].toDouble();
    return {grads[0] * (1 - y * y), Tensor()};
  }
};
// [/mended]

// [check]
template <typename Function>
void check(const char* name) {
  const auto x = torch::linspace(-3, 3, 8, torch::kFloat64).view({2, 4}).requires_grad_();
  const auto result = torchmoe::testing::gradcheck<Function>({x}, {}, /*cap=*/2.0);
  std::printf("%s: %s\n", name, result.ok ? "right" : result.message.c_str());
}
// [/check]

// [layer]
void certify() {
  torchmoe::nn::Router linear(torchmoe::nn::RouterOptions(8, 4));
  linear->to(torch::kFloat64);
  torchmoe::nn::MoE moe(torchmoe::nn::MoEOptions(8, 6, /*num_experts=*/4, /*top_k=*/2)
                            .router([linear](const Tensor& x) mutable {
                              return MendedSoftCap::apply(linear(x), /*cap=*/2.0);
                            }));
  moe->to(torch::kFloat64);
  auto parameters = moe->named_parameters().pairs();
  parameters.emplace_back("router.weight", linear->weight);
  const auto certificate = torchmoe::testing::certify(
      {.forward = [&](const auto& x, const auto& mask) -> torchmoe::testing::Tensors {
         const auto output = moe->forward(x, mask);
         return {output.hidden_states, output.aux_loss};
       },
       .parameters = parameters},
      torch::randn({5, 8}, torch::kFloat64));
  std::cout << certificate.to_string();
}
// [/layer]

int main() {
  torch::manual_seed(0);
  check<SoftCap>("SoftCap");
  check<MendedSoftCap>("MendedSoftCap");
  certify();
}
