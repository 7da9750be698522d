// Checks an op's gradient with the installed headers alone.
#include <cstdio>

#include <torchmoe/testing.h>
#include <torchmoe/torchmoe.h>

int main() {
  const auto options = at::TensorOptions().dtype(at::kDouble);
  const auto x = at::linspace(-1, 1, 15, options).view({5, 3}).requires_grad_();
  const auto weight = at::linspace(2, -1, 12, options).view({4, 3}).requires_grad_();
  const auto result = torchmoe::testing::gradcheck(
      [](const auto& in) { return torchmoe::router_logits(in[0], in[1]); }, {x, weight});
  std::printf("%s\n", result.ok ? "ok" : result.message.c_str());
  return result.ok ? 0 : 1;
}
