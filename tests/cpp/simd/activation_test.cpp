// The activations of every instruction set against the float64 formulas of common/activation.h.
#include "common/activation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/simd/instruction_sets.h"
#include "simd/catch2.h"
#include "simd/expected_activation.h"
#include "simd/memory.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::Gating;
using torchmoe::Nonlinearity;
using torchmoe::cpu::dots_of;
using torchmoe::cpu::Element;
using torchmoe::cpu::instruction_sets;
using torchmoe::cpu::kDotColumns;
using torchmoe::cpu::MutableNumbers;
using torchmoe::cpu::Numbers;
using torchmoe::cpu::Simd;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kSecondOrder = 1.001;
constexpr Gating kPlain{1, kInf, 0, kInf, kInf, /*is_plain=*/true, /*interleaved=*/false};
// Numbers that float32 has.
constexpr Gating kShaped{1.5, 2.5, 1, kInf, kInf, /*is_plain=*/false, /*interleaved=*/false};
constexpr Gating kSoft{1, kInf, 0, 4, 25, /*is_plain=*/false, /*interleaved=*/false};
constexpr Gating kAll{0.75, 8, -0.5, 3, 2.5, /*is_plain=*/false, /*interleaved=*/false};

const std::vector<std::pair<Nonlinearity, const char*>> kNonlinearities = {
    {Nonlinearity::relu, "relu"},
    {Nonlinearity::relu2, "relu2"},
    {Nonlinearity::silu, "silu"},
    {Nonlinearity::gelu, "gelu"},
    {Nonlinearity::gelu_tanh, "gelu_tanh"}};

/// The formulas of common/activation.h.
template <typename T>
torchmoe::ValueAndSlope<T> formula(Nonlinearity f, T u) {
  torchmoe::ValueAndSlope<T> result{};
  torchmoe::with_nonlinearity(f, [&](auto g) { result = g.with_slope(u); });
  return result;
}

/// -100 to 100, the more the closer to 0, and where a formula might break.
std::vector<float> sweep() {
  std::vector<float> numbers;
  for (int i = -4000; i <= 4000; ++i) {
    numbers.push_back(static_cast<float>(i) / 40);
    numbers.push_back(static_cast<float>(i) / 397);
  }
  for (int e = -149; e < 7; ++e) {
    for (const float mantissa : {1.0F, 1.37F, 1.9999F}) {
      numbers.push_back(std::ldexp(mantissa, e));
      numbers.push_back(-std::ldexp(mantissa, e));
    }
  }
  for (const float edge : {87.33F,
                           87.336F,
                           88.0F,
                           88.72F,
                           88.7228F,
                           88.73F,
                           88.74F,
                           88.8F,
                           13.2F,
                           13.214F,
                           13.22F,
                           10.1F,
                           10.05F,
                           16.6F,
                           17.3F,
                           5.0F,
                           0.0F}) {
    for (const float x : {edge, std::nextafter(edge, kInf), std::nextafter(edge, -kInf)}) {
      numbers.push_back(x);
      numbers.push_back(-x);
    }
  }
  return numbers;
}

/// Not finite, or so large that an intermediate result is not.
std::vector<float> specials() {
  std::vector<float> numbers = {kNaN};
  for (const float x : {kInf,
                        3.4e38F,
                        1e38F,
                        1e30F,
                        2e19F,
                        1.8e19F,
                        1e19F,
                        1e15F,
                        2e13F,
                        1e13F,
                        1e12F,
                        1e6F,
                        1e4F,
                        200.0F,
                        88.8F,
                        0.0F,
                        1e-40F,
                        1e-45F}) {
    numbers.push_back(x);
    numbers.push_back(-x);
  }
  return numbers;
}

const char* class_of(float x) {
  return std::isnan(x) ? "NaN" : !std::isinf(x) ? "finite" : x > 0 ? "inf" : "-inf";
}

/// Counts wrong elements and keeps a text of the first.
class Wrong {
 public:
  void check(const char* what, double actual, Bounded expected, double given) {
    const double allowed = kSecondOrder * expected.error + 8 * kLeast;
    if (!(std::fabs(actual - expected.value) <= allowed)) {
      add(what, given, actual, expected.value, allowed);
    }
  }
  void check_bits(const char* what, double actual, double expected, double given) {
    const bool is_same = std::isnan(expected)
                             ? std::isnan(actual)
                             : actual == expected && std::signbit(actual) == std::signbit(expected);
    if (!is_same) {
      add(what, given, actual, expected, 0);
    }
  }
  std::string text() const { return text_; }

 private:
  void add(const char* what, double given, double actual, double expected, double allowed) {
    if (text_.empty()) {
      std::ostringstream text;
      text.precision(10);
      text << what << " for u = " << given << ": " << actual << " instead of " << expected
           << ", allowed " << allowed;
      text_ = text.str();
    }
  }

  std::string text_;
};

Bounded times(Bounded x, double factor, double roundings) {
  return {x.value * factor, std::fabs(factor) * (x.error + roundings * kUnit * std::fabs(x.value))};
}

/// The same, rounded to T.
template <typename T>
Bounded stored(Bounded x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  }
  constexpr double kStored = RoundingOf<T>::kUnit;
  return {x.value, x.error * (1 + kStored) + kStored * std::fabs(x.value) + RoundingOf<T>::kLeast};
}

/// Gates and values as columns that alternate.
Matrix alternating(const Matrix& gates, const Matrix& ups) {
  Matrix result(gates.rows(), 2 * gates.columns());
  for (int64_t i = 0; i < gates.rows(); ++i) {
    for (int64_t j = 0; j < gates.columns(); ++j) {
      result(i, 2 * j) = gates(i, j);
      result(i, 2 * j + 1) = ups(i, j);
    }
  }
  return result;
}

/// The matrix with so many columns of NaN before it.
Matrix padded(const Matrix& matrix, int64_t gap) {
  Matrix result(matrix.rows(), gap + matrix.columns(), kNaN);
  for (int64_t i = 0; i < matrix.rows(); ++i) {
    std::copy_n(matrix.row(i), matrix.columns(), result.row(i) + gap);
  }
  return result;
}

float float_at(const Stored& stored, int64_t i, int64_t j) {
  return static_cast<const float*>(stored.numbers().data)[i * stored.values().columns() + j];
}

/// A forward call over `us` as [rows, columns], the biases already taken off where there are any.
struct Forward {
  Nonlinearity f;
  bool is_gated;
  bool has_biases;
  bool wants_pre;
  int64_t gap;
};

template <typename T>
std::string check_forward(const Simd& simd, const Forward& given, const Matrix& us) {
  const int64_t rows = us.rows(), columns = us.columns(), gap = given.gap;
  const Stored gate(padded(us, gap), Element::float32),
      up(padded(wave_matrix(rows, columns, 1, 3), gap), Element::float32);
  const Stored gate_bias(wave_matrix(1, columns, 2), element_of<T>()),
      up_bias(wave_matrix(1, columns, 3), element_of<T>());
  const Written<T> pre_gate(rows, columns, columns + gap), pre_up(rows, columns, columns + gap);
  const Written<T> act(rows, columns, columns + gap + 1);
  const auto* gates = static_cast<const float*>(gate.last(rows, columns).numbers.data);
  const auto* ups = static_cast<const float*>(up.last(rows, columns).numbers.data);
  const Numbers no_bias{nullptr, element_of<T>()};
  const MutableNumbers no_pre{nullptr, element_of<T>()};
  simd.activate({given.f,
                 kPlain,
                 rows,
                 columns,
                 gates,
                 given.is_gated ? ups : nullptr,
                 columns + gap,
                 /*step=*/1,
                 given.has_biases ? gate_bias.numbers() : no_bias,
                 given.has_biases && given.is_gated ? up_bias.numbers() : no_bias,
                 given.wants_pre ? numbers(pre_gate.data()) : no_pre,
                 given.wants_pre && given.is_gated ? numbers(pre_up.data()) : no_pre,
                 columns + gap,
                 numbers(act.data()),
                 columns + gap + 1});
  CHECK(act.is_only_matrix_written());
  CHECK(pre_gate.is_only_matrix_written());
  CHECK(pre_up.is_only_matrix_written());
  const auto* of_gate = static_cast<const T*>(gate_bias.numbers().data);
  const auto* of_up = static_cast<const T*>(up_bias.numbers().data);
  Wrong wrong;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t i = r * (columns + gap) + c;
      const float u = given.has_biases ? gates[i] + static_cast<float>(of_gate[c]) : gates[i];
      const float v = given.has_biases ? ups[i] + static_cast<float>(of_up[c]) : ups[i];
      if (given.wants_pre) {
        wrong.check_bits("pre_gate", pre_gate.at(r, c), static_cast<T>(u), u);
      }
      if (given.is_gated && given.wants_pre) {
        wrong.check_bits("pre_up", pre_up.at(r, c), static_cast<T>(v), u);
      }
      Bounded expected = expected_activation(given.f, u).value;
      if (given.is_gated) {
        expected = times(expected, v, 1);
      }
      wrong.check("act", act.at(r, c), stored<T>(expected), u);
    }
  }
  return wrong.text();
}

template <typename T>
std::string check_backward(
    const Simd& simd, Nonlinearity f, bool is_gated, int64_t gap, const Matrix& us) {
  const int64_t rows = us.rows(), columns = us.columns(), stride = columns + gap;
  const Stored pre_gate(padded(us, gap), element_of<T>()),
      pre_up(padded(wave_matrix(rows, columns, 1, 3), gap), element_of<T>());
  const Stored grad_act(padded(wave_matrix(rows, columns, 4), gap), Element::float32);
  const Stored weights(wave_matrix(1, rows, 5), Element::float32);
  const int64_t num_dots = dots_of(columns);
  const Written<T> weighted_act(rows, columns, stride + 1);
  const Written<T> grad_gate(rows, columns, stride), grad_up(rows, columns, stride);
  const Written<float> dots(rows, num_dots, num_dots + gap);
  const auto* grads = static_cast<const float*>(grad_act.last(rows, columns).numbers.data);
  const Numbers gates = pre_gate.last(rows, columns).numbers;
  const Numbers ups = pre_up.last(rows, columns).numbers;
  simd.activate_backward({f,
                          kPlain,
                          rows,
                          columns,
                          grads,
                          stride,
                          gates,
                          is_gated ? ups : Numbers{nullptr, ups.type},
                          stride,
                          /*step=*/1,
                          static_cast<const float*>(weights.numbers().data),
                          numbers(weighted_act.data()),
                          stride + 1,
                          numbers(grad_gate.data()),
                          is_gated ? numbers(grad_up.data()) : MutableNumbers{nullptr, ups.type},
                          stride,
                          dots.data(),
                          num_dots + gap});
  CHECK(weighted_act.is_only_matrix_written());
  CHECK(grad_gate.is_only_matrix_written());
  CHECK(grad_up.is_only_matrix_written());
  CHECK(dots.is_only_matrix_written());
  Wrong wrong;
  for (int64_t r = 0; r < rows; ++r) {
    const double weight = float_at(weights, 0, r);
    std::vector<Bounded> expected_dots(num_dots, {0, 0});
    std::vector<double> dot_sizes(num_dots, 0);
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t i = r * stride + c;
      const double u = static_cast<float>(static_cast<const T*>(gates.data)[i]);
      const double grad = grads[i];
      const double up = is_gated ? static_cast<float>(static_cast<const T*>(ups.data)[i]) : 1;
      const double product = is_gated ? 1 : 0;  // the rounding of what is multiplied by up
      const auto [value, slope] = expected_activation(f, u);
      wrong.check("grad_gate",
                  grad_gate.at(r, c),
                  stored<T>(times(slope, weight * grad * up, 2 + product)),
                  u);
      if (is_gated) {
        wrong.check("grad_up", grad_up.at(r, c), stored<T>(times(value, weight * grad, 2)), u);
      }
      const Bounded act = times(value, up, product);
      wrong.check("weighted_act", weighted_act.at(r, c), stored<T>(times(act, weight, 1)), u);
      auto& dot = expected_dots[c / kDotColumns];
      dot.value += grad * act.value;
      dot.error += std::fabs(grad) * act.error;
      dot_sizes[c / kDotColumns] += std::fabs(grad * act.value);
    }
    for (int64_t i = 0; i < num_dots; ++i) {
      // A product of kDotColumns terms; as in product_test.cpp.
      expected_dots[i].error += static_cast<double>(kDotColumns + 1) * kUnit * dot_sizes[i];
      wrong.check("dots", dots.at(r, i), expected_dots[i], static_cast<double>(r));
    }
  }
  return wrong.text();
}

/// Both directions of gates `us` with values, under `gating`, side by side or alternating.
template <typename T>
std::string check_gated(
    const Simd& simd, Nonlinearity f, Gating gating, bool interleaved, const Matrix& us) {
  const int64_t rows = us.rows(), columns = us.columns();
  const int64_t step = interleaved ? 2 : 1, width = step * columns;
  gating.interleaved = interleaved;
  const Matrix values = wave_matrix(rows, columns, 1, 3);
  const Matrix gate_bias = wave_matrix(1, columns, 2), up_bias = wave_matrix(1, columns, 3);
  const auto laid_out = [&](const Matrix& gates, const Matrix& ups, Element type) {
    const Matrix alternate = alternating(gates, ups);
    return std::pair{Stored(interleaved ? alternate : gates, type),
                     Stored(interleaved ? alternate : ups, type)};
  };
  const auto [gate, up] = laid_out(us, values, Element::float32);
  const auto [of_gate, of_up] = laid_out(gate_bias, up_bias, element_of<T>());
  const auto second = [&](Numbers first, Numbers other, int64_t bytes) {
    return interleaved ? Numbers{static_cast<const char*>(first.data) + bytes, first.type} : other;
  };
  const Written<T> pre(rows, 2 * columns, 2 * columns), act(rows, columns, columns);
  const Written<T> grad_pre(rows, 2 * columns, 2 * columns), weighted(rows, columns, columns);
  const Written<float> dots(rows, dots_of(columns), dots_of(columns));
  const int64_t up_place = interleaved ? 1 : columns;
  simd.activate({f,
                 gating,
                 rows,
                 columns,
                 static_cast<const float*>(gate.numbers().data),
                 static_cast<const float*>(second(gate.numbers(), up.numbers(), 4).data),
                 width,
                 step,
                 of_gate.numbers(),
                 second(of_gate.numbers(), of_up.numbers(), sizeof(T)),
                 numbers(pre.data()),
                 numbers(pre.data() + up_place),
                 2 * columns,
                 numbers(act.data()),
                 columns});
  const Stored grads(wave_matrix(rows, columns, 4), Element::float32);
  const Stored weights(wave_matrix(1, rows, 5), Element::float32);
  const auto pre_numbers = [&](int64_t place) {
    const auto [data, type] = numbers(pre.data() + place);
    return Numbers{data, type};
  };
  simd.activate_backward({f,
                          gating,
                          rows,
                          columns,
                          static_cast<const float*>(grads.numbers().data),
                          columns,
                          pre_numbers(0),
                          pre_numbers(up_place),
                          2 * columns,
                          step,
                          static_cast<const float*>(weights.numbers().data),
                          numbers(weighted.data()),
                          columns,
                          numbers(grad_pre.data()),
                          numbers(grad_pre.data() + up_place),
                          2 * columns,
                          dots.data(),
                          dots_of(columns)});
  CHECK(act.is_only_matrix_written());
  CHECK(pre.is_only_matrix_written());
  CHECK(grad_pre.is_only_matrix_written());
  CHECK(weighted.is_only_matrix_written());
  Wrong wrong;
  for (int64_t r = 0; r < rows; ++r) {
    const double weight = float_at(weights, 0, r);
    for (int64_t c = 0; c < columns; ++c) {
      const auto bias = [&](const Stored& of, int64_t place) {
        return static_cast<float>(static_cast<const T*>(of.numbers().data)[place]);
      };
      const float u =
          static_cast<float>(us(r, c)) + (interleaved ? bias(of_gate, 2 * c) : bias(of_gate, c));
      const float v = static_cast<float>(values(r, c)) +
                      (interleaved ? bias(of_gate, 2 * c + 1) : bias(of_up, c));
      const int64_t gate_place = step * c, value_place = step * c + up_place;
      wrong.check_bits("pre_gate", pre.at(r, gate_place), static_cast<T>(u), u);
      wrong.check_bits("pre_up", pre.at(r, value_place), static_cast<T>(v), u);
      wrong.check("act", act.at(r, c), stored<T>(expected_gated(f, gating, u, v).value), u);
      const auto back = expected_gated(
          f, gating, static_cast<float>(static_cast<T>(u)), static_cast<float>(static_cast<T>(v)));
      const double grad = weight * float_at(grads, r, c);
      wrong.check(
          "grad_gate", grad_pre.at(r, gate_place), stored<T>(times(back.by_gate, grad, 2)), u);
      wrong.check("grad_up", grad_pre.at(r, value_place), stored<T>(times(back.by_up, grad, 2)), u);
      wrong.check("weighted", weighted.at(r, c), stored<T>(times(back.value, weight, 1)), u);
    }
  }
  return wrong.text();
}

/// `numbers` in rows of `columns`, the last row filled up with the first element.
Matrix in_rows(const std::vector<float>& numbers, int64_t columns) {
  const auto count = static_cast<int64_t>(numbers.size());
  Matrix all((count + columns - 1) / columns, columns, numbers[0]);
  std::copy(numbers.begin(), numbers.end(), all.numbers().begin());
  return all;
}

}  // namespace

TEST_CASE("activation: what is expected is what common/activation.h says", "[activation]") {
  for (const auto& [f, name] : kNonlinearities) {
    INFO(name);
    double worst = 0;
    for (const float number : sweep()) {
      const double u = number;
      const auto [value, slope] = formula<double>(f, u);
      const ExpectedActivation expected = expected_activation(f, u);
      // 1 + erf and 1 + tanh are off by 2^-53 and what erf and tanh are off by.
      const double scale = std::max(1.0, std::fabs(u));
      worst = std::max(worst, std::fabs(value - expected.value.value) / scale);
      worst = std::max(worst, std::fabs(slope - expected.slope.value) / (scale * scale * scale));
    }
    CHECK(worst <= 4 * std::numeric_limits<double>::epsilon());
  }
}

TEST_CASE("activate: values", "[activation]") {
  const Matrix us = in_rows(sweep(), 101);
  for (const auto& [f, f_name] : kNonlinearities) {
    for (const bool is_gated : {false, true}) {
      for (const auto& [name, functions] : instruction_sets()) {
        INFO(name << " " << f_name << (is_gated ? " gated" : ""));
        const Forward call{f, is_gated, false, true, 0};
        CHECK(check_forward<float>(*functions, call, us) == "");
        CHECK(check_forward<BFloat16>(*functions, call, us) == "");
        CHECK(check_forward<Float16>(*functions, call, us) == "");
      }
    }
  }
}

TEST_CASE("activate: sizes, biases and what is wanted", "[activation]") {
  for (const auto& [f, f_name] : kNonlinearities) {
    for (const auto& [name, functions] : instruction_sets()) {
      for (const int64_t columns : {0, 1, 7, 8, 9, 15, 16, 17, 31, 33}) {
        const Matrix us = wave_matrix(columns == 17 ? 0 : 3, columns, 0, 6);
        for (int choice = 0; choice < 8; ++choice) {
          const Forward call{
              f, (choice & 1) != 0, (choice & 2) != 0, (choice & 4) != 0, choice % 3};
          INFO(name << " " << f_name << " " << columns << " columns, choice " << choice);
          CHECK(check_forward<float>(*functions, call, us) == "");
          CHECK(check_forward<BFloat16>(*functions, call, us) == "");
          CHECK(check_forward<Float16>(*functions, call, us) == "");
        }
      }
    }
  }
}

TEST_CASE("activate_backward: values", "[activation]") {
  const Matrix us = in_rows(sweep(), 101);
  for (const auto& [f, f_name] : kNonlinearities) {
    for (const bool is_gated : {false, true}) {
      for (const auto& [name, functions] : instruction_sets()) {
        INFO(name << " " << f_name << (is_gated ? " gated" : ""));
        CHECK(check_backward<float>(*functions, f, is_gated, 0, us) == "");
        CHECK(check_backward<BFloat16>(*functions, f, is_gated, 0, us) == "");
        CHECK(check_backward<Float16>(*functions, f, is_gated, 0, us) == "");
      }
    }
  }
}

TEST_CASE("activate_backward: sizes", "[activation]") {
  for (const auto& [f, f_name] : kNonlinearities) {
    for (const auto& [name, functions] : instruction_sets()) {
      for (const int64_t columns : {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 200}) {
        for (const bool is_gated : {false, true}) {
          for (const int64_t gap : {0, 3}) {
            INFO(name << " " << f_name << " " << columns << " columns, gap " << gap
                      << (is_gated ? ", gated" : ""));
            const Matrix us = wave_matrix(columns == 17 ? 0 : 3, columns, 0, 6);
            CHECK(check_backward<float>(*functions, f, is_gated, gap, us) == "");
            CHECK(check_backward<BFloat16>(*functions, f, is_gated, gap, us) == "");
            CHECK(check_backward<Float16>(*functions, f, is_gated, gap, us) == "");
          }
        }
      }
    }
  }
}

TEST_CASE("activation: what gated ones do besides f(gate) * up", "[activation]") {
  const Matrix us = in_rows(sweep(), 101);
  for (const auto& [f, f_name] : kNonlinearities) {
    for (const auto& gating : {kPlain, kShaped, kSoft, kAll}) {
      for (const bool interleaved : {false, true}) {
        for (const auto& [name, functions] : instruction_sets()) {
          INFO(name << " " << f_name << ", alpha " << gating.alpha << ", softcap "
                    << gating.gate_softcap << (interleaved ? ", interleaved" : ""));
          CHECK(check_gated<float>(*functions, f, gating, interleaved, us) == "");
          CHECK(check_gated<BFloat16>(*functions, f, gating, interleaved, us) == "");
          CHECK(check_gated<Float16>(*functions, f, gating, interleaved, us) == "");
          for (const int64_t columns : {0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33}) {
            const Matrix few = wave_matrix(3, columns, 0, 6);
            CHECK(check_gated<float>(*functions, f, gating, interleaved, few) == "");
            CHECK(check_gated<BFloat16>(*functions, f, gating, interleaved, few) == "");
          }
        }
      }
    }
  }
}

TEST_CASE("activation: the formula of gated ones is the scalar one", "[activation]") {
  for (const auto& [f, f_name] : kNonlinearities) {
    for (const auto& gating : {kPlain, kShaped, kSoft, kAll}) {
      INFO(f_name << ", alpha " << gating.alpha << ", softcap " << gating.gate_softcap);
      double worst = 0;
      for (const float u : sweep()) {
        for (const double v : {-30.0, -1.5, 0.0, 0.3, 2.0, 30.0}) {
          torchmoe::GatedValue<double> scalar{};
          const auto run = [&](auto gate) { scalar = gate.with_slopes(gating, double{u}, v); };
          if (gating.is_plain) {
            torchmoe::with_gate<torchmoe::PlainGate>(f, run);
          }
          torchmoe::with_gate<torchmoe::ShapedGate>(f, run);
          const ExpectedGated expected = expected_gated(f, gating, u, v);
          const double size = std::max(1.0, std::fabs(double{u})), scale = 30 * size * size * size;
          worst = std::max({worst,
                            std::fabs(scalar.value - expected.value.value) / scale,
                            std::fabs(scalar.by_gate - expected.by_gate.value) / scale,
                            std::fabs(scalar.by_up - expected.by_up.value) / scale});
        }
      }
      CHECK(worst <= 4 * std::numeric_limits<double>::epsilon());
    }
  }
}

TEST_CASE("activation: inf, NaN and overflow as in the scalar formulas", "[activation]") {
  const Stored us(in_rows(specials(), 1), Element::float32);
  const int64_t rows = us.values().rows();
  const auto* u = static_cast<const float*>(us.numbers().data);
  const std::vector<float> ones(rows, 1);
  for (const auto& [f, f_name] : kNonlinearities) {
    for (const auto& [name, functions] : instruction_sets()) {
      const Written<float> act(rows, 1, 1), weighted_act(rows, 1, 1), slope(rows, 1, 1),
          dots(rows, 1, 1), pre(rows, 1, 1);
      const MutableNumbers pre_gate = numbers(pre.data());
      functions->activate(
          {f, kPlain, rows, 1, u, nullptr, 1, 1, {}, {}, pre_gate, {}, 1, numbers(act.data()), 1});
      functions->activate_backward({f,
                                    kPlain,
                                    rows,
                                    1,
                                    ones.data(),
                                    1,
                                    numbers(u),
                                    Numbers{},
                                    1,
                                    /*step=*/1,
                                    ones.data(),
                                    numbers(weighted_act.data()),
                                    1,
                                    numbers(slope.data()),
                                    MutableNumbers{},
                                    1,
                                    dots.data(),
                                    1});
      for (int64_t i = 0; i < rows; ++i) {
        INFO(name << " " << f_name << " of " << u[i]);
        const auto scalar = formula<float>(f, u[i]);
        CHECK(std::string(class_of(act.at(i, 0))) == class_of(scalar.value));
        CHECK(std::string(class_of(weighted_act.at(i, 0))) == class_of(scalar.value));
        CHECK(std::string(class_of(dots.at(i, 0))) == class_of(scalar.value));
        CHECK(std::string(class_of(slope.at(i, 0))) == class_of(scalar.slope));
        Wrong wrong;
        const ExpectedActivation expected = expected_activation(f, u[i]);
        if (std::isfinite(scalar.value)) {
          wrong.check("value", act.at(i, 0), expected.value, u[i]);
        }
        if (std::isfinite(scalar.slope)) {
          wrong.check("slope", slope.at(i, 0), expected.slope, u[i]);
        }
        CHECK(wrong.text() == "");
        if (std::isfinite(u[i])) {
          CHECK(std::signbit(act.at(i, 0)) == std::signbit(scalar.value));
        }
      }
    }
  }
}

TEST_CASE("activation: NaN stays with its row", "[activation]") {
  constexpr int64_t kColumns = 19;
  const std::vector<float> ones(3 * kColumns, 1);
  for (const auto& [f, f_name] : kNonlinearities) {
    for (const auto& [name, functions] : instruction_sets()) {
      for (const int64_t column : {int64_t{0}, int64_t{9}, kColumns - 1}) {
        INFO(name << " " << f_name << " in column " << column);
        Matrix us = wave_matrix(3, kColumns, 0, 2);
        us(1, column) = kNaN;
        const Stored gates(us, Element::float32), up(wave_matrix(3, kColumns), Element::float32);
        const Written<float> act(3, kColumns, kColumns), gate(3, kColumns, kColumns),
            of_up(3, kColumns, kColumns), dots(3, 1, 1);
        functions->activate_backward({f,
                                      kPlain,
                                      3,
                                      kColumns,
                                      ones.data(),
                                      kColumns,
                                      gates.numbers(),
                                      up.numbers(),
                                      kColumns,
                                      /*step=*/1,
                                      ones.data(),
                                      numbers(act.data()),
                                      kColumns,
                                      numbers(gate.data()),
                                      numbers(of_up.data()),
                                      kColumns,
                                      dots.data(),
                                      1});
        for (int64_t i = 0; i < 3; ++i) {
          CHECK(std::isnan(dots.at(i, 0)) == (i == 1));
          for (int64_t j = 0; j < kColumns; ++j) {
            const bool is_nan = i == 1 && j == column;
            CHECK(std::isnan(act.at(i, j)) == is_nan);
            CHECK(std::isnan(of_up.at(i, j)) == is_nan);
            // relu's slope is 0 there, as in the scalar formula.
            CHECK(std::isnan(gate.at(i, j)) == (is_nan && f != Nonlinearity::relu));
          }
        }
      }
    }
  }
}
