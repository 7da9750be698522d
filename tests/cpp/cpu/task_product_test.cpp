// The products that tasks call, of every pair of types.
#include <string>
#include <vector>

#include "cpu/gemm/product.h"
#include "cpu/gemm/tasks.h"
#include "cpu/matrices.h"
#include "simd/expected_product.h"
#include "simd/memory.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using namespace torchmoe::cpu;   // NOLINT(google-build-using-namespace): what they are about

namespace {

/// product(), and with a bias, of a task.
template <typename L, typename R, typename Out>
void check_task(bool is_indexed) {
  using Acc = at::opmath_type<L>;
  constexpr int64_t kM = 11, kN = 19, kK = 205, kGap = 3;
  const double unit = std::numeric_limits<Acc>::epsilon() / 2;
  const double stored =
      std::is_same_v<Out, Acc> ? 0 : static_cast<double>(std::numeric_limits<Out>::epsilon()) / 2;
  for (const auto& [form, form_name] : kForms) {
    INFO(form_name << (is_indexed ? " by index" : ""));
    const bool left_has_terms = form == Form::tn, right_has_terms = form != Form::nt;
    const int64_t left_rows = left_has_terms ? kK : kM, left_width = left_has_terms ? kM : kK;
    const int64_t right_rows = right_has_terms ? kK : kN, right_width = right_has_terms ? kN : kK;
    const Tensor left =
        wave({left_rows + 1, left_width + 2}, 0, 1, c10::CppTypeToScalarType<L>::value);
    const Tensor right =
        wave({right_rows + 1, right_width + 2}, 2, 1, c10::CppTypeToScalarType<R>::value);
    const Tensor bias = wave({kN}, 3, 1, c10::CppTypeToScalarType<R>::value);
    Rows<L> of_left{left.const_data_ptr<L>(), left_width + 2};
    Rows<R> of_right{right.const_data_ptr<R>(), right_width + 2};
    Tensor a = left.to(torch::kDouble), b = right.to(torch::kDouble);
    std::vector<int64_t> left_index(left_rows + 1), right_index(right_rows + 1);
    if (is_indexed) {
      const auto set = [](std::vector<int64_t>& index, Tensor& matrix, auto& rows) {
        std::vector<Tensor> read;
        for (size_t i = 0; i < index.size(); ++i) {
          index[i] = i % 4 == 2 ? -3 : static_cast<int64_t>(i * 5 % index.size());
          read.push_back(index[i] < 0 ? torch::zeros_like(matrix[0]) : matrix[index[i]]);
        }
        matrix = torch::stack(read);
        rows.index = index.data();
      };
      set(left_index, a, of_left);
      set(right_index, b, of_right);
    }
    a = a.slice(0, 1).slice(1, 2);
    b = b.slice(0, 1).slice(1, 2);
    a = left_has_terms ? a.t() : a;
    b = right_has_terms ? b : b.t();
    const Tensor sizes = a.abs().matmul(b.abs()), sums = a.matmul(b);
    const Written<Acc> plain(kM, kN, kN + kGap);
    const Written<Out> with_bias(kM, kN, kN + kGap);
    run({[&, form = form](Workspace& workspace) {
          const ProductSizes shape{kM, kN, kK};
          const R* no_bias = nullptr;
          product(form,
                  of_left.from(1, 2),
                  of_right.from(1, 2),
                  shape,
                  no_bias,
                  plain.data(),
                  kN + kGap,
                  workspace);
          product(form,
                  of_left.from(1, 2),
                  of_right.from(1, 2),
                  shape,
                  bias.const_data_ptr<R>(),
                  with_bias.data(),
                  kN + kGap,
                  workspace);
        }},
        /*multiplications=*/kM * kN * kK);
    // Twice, for float64 is as exact as what it is compared with.
    const Tensor tolerance = 2 * (kK + 2) * unit * sizes;
    CHECK(mismatch(plain.values(), {matrix_of(sums), matrix_of(tolerance)}) == "");
    const Tensor result = sums + bias.to(torch::kDouble);
    const Tensor allowed = (tolerance + unit * result.abs()) * (1 + stored) + stored * result.abs();
    CHECK(mismatch(with_bias.values(), {matrix_of(result), matrix_of(allowed)}) == "");
    CHECK(plain.is_only_matrix_written());
    CHECK(with_bias.is_only_matrix_written());
  }
}

}  // namespace

TEST_CASE("product: a task's, of every type", "[cpu][product]") {
  for (const bool is_indexed : {false, true}) {
    check_task<double, double, double>(is_indexed);
    check_task<float, float, float>(is_indexed);
    check_task<c10::BFloat16, c10::BFloat16, c10::BFloat16>(is_indexed);
    check_task<c10::BFloat16, c10::BFloat16, float>(is_indexed);
    check_task<float, c10::BFloat16, float>(is_indexed);
    check_task<c10::Half, c10::Half, c10::Half>(is_indexed);
    check_task<float, c10::Half, c10::Half>(is_indexed);
  }
}

TEST_CASE("product: a task's of nothing", "[cpu][product]") {
  const Written<double> out(2, 3, 4);
  run({[&](Workspace& workspace) {
        const Rows<double> none{nullptr, 1};
        const double* no_bias = nullptr;
        product(Form::nn, none, none, {0, 3, 2}, no_bias, out.data(), 4, workspace);
        product(Form::tn, none, none, {2, 0, 2}, no_bias, out.data(), 4, workspace);
        product(Form::nt, none, none, {2, 3, 0}, no_bias, out.data(), 4, workspace);
      }},
      /*multiplications=*/0);
  CHECK(out.values().equals(Matrix(2, 3)));
  CHECK(out.is_only_matrix_written());
}
