#include "support.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "common/dtypes.h"

namespace torchmoe::test {

double epsilon(at::ScalarType type) {
  return with_float_type(type,
                         []<typename T>() -> double { return std::numeric_limits<T>::epsilon(); });
}

std::string difference(const Tensor& actual,
                       const Tensor& expected,
                       int64_t terms,
                       double rounded) {
  if (actual.sizes() != expected.sizes()) {
    return c10::str("shape ", actual.sizes(), " instead of ", expected.sizes());
  }
  if (actual.numel() == 0) {
    return "";
  }
  const double stored = epsilon(actual.scalar_type());
  const double accumulated = std::min(stored, epsilon(torch::kFloat));
  const Tensor a = actual.detach().to(torch::kDouble), b = expected.detach().to(torch::kDouble);
  const Tensor finite = b.masked_select(b.isfinite());
  const double scale = finite.numel() == 0 ? 1 : std::max(1.0, finite.abs().max().item<double>());
  const Tensor error = (a - b).abs();
  const double on_the_way = static_cast<double>(terms) * accumulated + rounded;
  const Tensor allowed = kToleranceFactor * on_the_way * scale + stored * b.abs();
  const Tensor right = (error <= allowed) | (a == b) | (a.isnan() & b.isnan());
  if (right.all().item<bool>()) {
    return "";
  }
  const int64_t worst = torch::where(right, -torch::ones_like(error), error.nan_to_num(1e300))
                            .argmax()
                            .item<int64_t>();
  std::ostringstream text;
  text.precision(10);
  text << "flat entry " << worst << ": " << a.flatten()[worst].item<double>() << " instead of "
       << b.flatten()[worst].item<double>() << ", allowed "
       << allowed.flatten()[worst].item<double>();
  return text.str();
}

Tensor wave(at::IntArrayRef sizes, double phase, double scale, at::ScalarType dtype) {
  const auto numel = c10::multiply_integers(sizes);
  return torch::arange(numel, torch::kFloat64)
      .mul(1.3)
      .add(0.4 + phase)
      .sin()
      .mul(scale)
      .view(sizes)
      .to(dtype);
}

Tensor leaf(at::IntArrayRef sizes, double phase, double scale) {
  return wave(sizes, phase, scale).requires_grad_();
}

Tensor strided(const Tensor& x) {
  return torch::stack({x, torch::full_like(x, 77)}, -1)
      .transpose(0, 1)
      .contiguous()
      .transpose(0, 1)
      .select(-1, 0);
}

Tensor fixture_logits() {
  const Tensor t = torch::arange(12, torch::kFloat64).unsqueeze(1);
  const Tensor e = torch::arange(4, torch::kFloat64);
  return 2 * torch::sin(1.7 * t + 0.9 * e + 0.3 * t * e);
}

Tensor fixture_indices() {
  return ids({{2, 1},
              {0, 1},
              {3, 2},
              {2, 1},
              {3, 1},
              {0, 2},
              {1, 2},
              {3, 1},
              {2, 0},
              {3, 0},
              {1, 2},
              {2, 3}});
}

Tensor ids(const std::vector<std::vector<int64_t>>& rows) {
  const auto columns = rows.empty() ? 0 : static_cast<int64_t>(rows[0].size());
  Tensor result = torch::empty({static_cast<int64_t>(rows.size()), columns}, torch::kLong);
  int64_t* out = result.data_ptr<int64_t>();
  for (const auto& row : rows) {
    out = std::copy(row.begin(), row.end(), out);
  }
  return result;
}

std::vector<Choice> choices() {
  constexpr int64_t kFar = std::numeric_limits<int64_t>::max();
  return {
      {"plain", ids({{0, 1}, {2, 3}, {1, 2}, {3, 0}, {2, 1}})},
      {"dropped slots", ids({{0, -1}, {-1, 3}, {-1, -1}, {3, 0}, {2, 1}})},
      {"ids past the end", ids({{0, 4}, {kFar, 3}, {-kFar, 9}, {3, 0}, {2, 1}})},
      {"an expert without tokens", ids({{0, 1}, {1, 3}, {1, 0}, {3, 0}, {3, 1}})},
      {"all on one expert", ids({{2, -1}, {2, -1}, {2, -1}, {2, -1}, {2, -1}})},
      {"an expert twice", ids({{1, 1}, {2, 2}, {0, 3}, {3, 3}, {0, 0}})},
      {"all dropped", ids({{-1, -1}, {-1, -1}, {-1, -1}, {-1, -1}, {-1, -1}})},
      {"one choice", ids({{0}, {2}, {2}, {-1}, {3}})},
      {"every expert", ids({{0, 1, 2, 3}, {3, 2, 1, 0}, {1, 3, 0, 2}, {2, 0, 3, 1}, {0, 2, 1, 3}})},
  };
}

bool same_plan(const DispatchPlan& a, const DispatchPlan& b) {
  return torch::equal(a.expert_offsets, b.expert_offsets) &&
         torch::equal(a.row_to_slot, b.row_to_slot) && torch::equal(a.slot_to_row, b.slot_to_row);
}

}  // namespace torchmoe::test
