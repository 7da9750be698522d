// The matrix products of every instruction set against float64 ones.
#include "cpu/gemm/product.h"

#include <bit>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu/expected_product.h"
#include "cpu/gemm/tasks.h"
#include "cpu/instruction_sets.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using namespace torchmoe::cpu;   // NOLINT(google-build-using-namespace): what they are about

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using Types = std::pair<at::ScalarType, at::ScalarType>;

const Types kFloats = {torch::kFloat, torch::kFloat};

std::vector<Types> pairs_of_types() {
  std::vector<Types> pairs = {kFloats, {torch::kDouble, torch::kDouble}};
  for (const auto type : {torch::kBFloat16, torch::kHalf}) {
    pairs.insert(pairs.end(), {{type, type}, {torch::kFloat, type}});
  }
  return pairs;
}

at::ScalarType type_of(Element element) {
  return element == Element::float64    ? torch::kDouble
         : element == Element::bfloat16 ? torch::kBFloat16
         : element == Element::float16  ? torch::kHalf
                                        : torch::kFloat;
}

/// The type of the sums of a product with this right operand.
Element sums_of(Element right) {
  return right == Element::float64 ? Element::float64 : Element::float32;
}

/// The last rows and columns of what is expected.
ExpectedProduct last(const ExpectedProduct& expected, int64_t m, int64_t n) {
  const auto cut = [&](const Tensor& x) {
    return x.slice(0, x.size(0) - m).slice(1, x.size(1) - n);
  };
  return {cut(expected.sums), cut(expected.tolerance)};
}

/// A product's scratch, full of NaN before each call.
class Products {
 public:
  explicit Products(const Simd& simd) : simd_(simd) {}

  struct Rest {
    int64_t gap = 0;  // between the rows of the result
    Numbers bias{};
    std::optional<Element> out{};  // that of the sums where nothing is said
    char scratch_byte = '\xff';
  };

  Tensor operator()(Form form,
                    const NumberRows& left,
                    const NumberRows& right,
                    int64_t m,
                    int64_t n,
                    int64_t k,
                    const Rest& rest) {
    const auto type = type_of(rest.out.value_or(sums_of(right.numbers.type)));
    ProductCall call{form, left, right, m, n, k, rest.bias, {}, n + rest.gap, nullptr};
    if (type == torch::kDouble) {
      return written<double>(call, rest);
    }
    return type == torch::kBFloat16 ? written<c10::BFloat16>(call, rest)
           : type == torch::kHalf   ? written<c10::Half>(call, rest)
                                    : written<float>(call, rest);
  }
  Tensor operator()(
      Form form, const NumberRows& left, const NumberRows& right, int64_t m, int64_t n, int64_t k) {
    return (*this)(form, left, right, m, n, k, Rest{});
  }

 private:
  template <typename Out>
  Tensor written(ProductCall call, const Rest& rest) {
    const Written<Out> out(call.m, call.n, call.out_stride);
    call.out = numbers(out.data());
    const int64_t bytes = simd_.product_scratch(call);
    if (bytes > bytes_) {
      scratch_ = std::make_unique<Guarded>(bytes);
      bytes_ = bytes;
    }
    // Aligned to 64 bytes; the memory of all scratches so far ends there too.
    call.scratch =
        reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(scratch_->last<char>(bytes)) / 64 * 64);
    std::memset(call.scratch, rest.scratch_byte, bytes);
    simd_.product(call);
    CHECK(out.is_only_matrix_written());
    return out.values().clone();
  }

  const Simd& simd_;
  std::unique_ptr<Guarded> scratch_;
  int64_t bytes_ = -1;
};

/// Operands of a form, of which a test uses the last rows and elements.
class Operands {
 public:
  Operands(Form form, const Types& types, int64_t m, int64_t n, int64_t k)
      : Operands(form, types, wave({m, k}, 0), wave({k, n}, 2)) {}

  /// left [m, k], right [k, n].
  Operands(Form form, const Types& types, const Tensor& left, const Tensor& right)
      : form_(form),
        left_(form == Form::tn ? left.t() : left, types.first),
        right_(form == Form::nt ? right.t() : right, types.second),
        unit_(unit_of_sums(types.second)) {}

  ExpectedProduct expected(int64_t k) const {
    const Tensor left = form_ == Form::tn ? left_.values().t() : left_.values();
    const Tensor right = form_ == Form::nt ? right_.values().t() : right_.values();
    return expected_product(
        left.slice(1, left.size(1) - k), right.slice(0, right.size(0) - k), unit_);
  }
  NumberRows left(int64_t m, int64_t k) const {
    return form_ == Form::tn ? left_.last(k, m) : left_.last(m, k);
  }
  NumberRows right(int64_t n, int64_t k) const {
    return form_ == Form::nt ? right_.last(n, k) : right_.last(k, n);
  }

 private:
  Form form_;
  Stored left_;
  Stored right_;
  double unit_;
};

using Sizes = std::vector<int64_t>;

/// Every m with every n and every k. All but the largest have strides beyond their rows.
void check_sizes(const Types& types, const Sizes& ms, const Sizes& ns, const Sizes& ks) {
  const auto largest = [](const Sizes& sizes) {
    return *std::max_element(sizes.begin(), sizes.end());
  };
  for (const auto& [form, form_name] : kForms) {
    const Operands operands(form, types, largest(ms), largest(ns), largest(ks));
    for (const int64_t k : ks) {
      const ExpectedProduct expected = operands.expected(k);
      for (const auto& [name, functions] : instruction_sets()) {
        Products products(*functions);
        for (const int64_t m : ms) {
          for (const int64_t n : ns) {
            INFO(name << " " << form_name << " " << types.first << " " << types.second << " m " << m
                      << " n " << n << " k " << k);
            const Tensor actual = products(
                form, operands.left(m, k), operands.right(n, k), m, n, k, {.gap = (m + n + k) % 4});
            CHECK(mismatch(actual, last(expected, m, n)) == "");
          }
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("simd: the chosen instruction set is one that the processor has", "[cpu][product]") {
  bool is_known = false;
  for (const auto& [name, functions] : instruction_sets()) {
    is_known = is_known || &simd() == functions;
  }
  CHECK(is_known);
}

TEST_CASE("product: sizes around those of a tile", "[cpu][product]") {
  check_sizes(kFloats,
              {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 19},
              {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 65, 97},
              {0, 1, 2, 7, 8, 9, 15, 16, 17, 33});
}

TEST_CASE("product: every pair of types", "[cpu][product]") {
  for (const auto& types : pairs_of_types()) {
    check_sizes(types, {1, 6, 7, 9, 10, 19}, {1, 8, 15, 17, 33, 48, 65}, {1, 8, 9, 33});
  }
}

TEST_CASE("product: sizes around those of a block", "[cpu][product]") {
  for (const auto& types : pairs_of_types()) {
    const bool is_all = types == kFloats;  // the blocks are the same for every type
    check_sizes(types, is_all ? Sizes{251, 252, 253, 504, 505} : Sizes{252, 253}, {17}, {3});
    check_sizes(
        types, {7}, is_all ? Sizes{511, 512, 513, 1024, 1025} : Sizes{511, 512, 513}, {3, 17});
    // Terms of a slice: 512 lanes of one or two where there are few columns, and for 512 columns as
    // many as 512 KB hold: 128, 256 or 512.
    check_sizes(types,
                {1, 7, 10},
                {17, 49},
                is_all ? Sizes{511, 512, 513, 1023, 1024, 1025, 1537}
                       : Sizes{511, 512, 513, 1023, 1024, 1025, 1026, 2049});
    check_sizes(types, {10}, {513}, {127, 128, 129, 257, 511, 513});
    check_sizes(types, {253}, {513}, {129, 515});
  }
  check_sizes(kFloats, {1, 2, 3, 4, 5, 8}, {512, 1000}, {384, 385, 1030});
  check_sizes(kFloats, {252, 505}, {512, 1025}, {385});
}

TEST_CASE("product: no terms give zeros", "[cpu][product]") {
  for (const auto& [form, form_name] : kForms) {
    for (const auto& [name, functions] : instruction_sets()) {
      INFO(name << " " << form_name);
      const NumberRows none{{nullptr, Element::bfloat16}, 0, nullptr};
      const Tensor out = Products(*functions)(form, none, none, 3, 50, 0, {.gap = 2});
      CHECK(torch::equal(out, torch::zeros({3, 50})));
      CHECK_FALSE(out.signbit().any().item<bool>());
      const Stored bias(wave({1, 50}), torch::kBFloat16);
      CHECK(torch::equal(
          Products(*functions)(
              form, none, none, 3, 50, 0, {.bias = bias.numbers(), .out = Element::bfloat16}),
          bias.values().to(torch::kBFloat16).expand({3, 50})));
    }
  }
}

TEST_CASE("product: rows by index", "[cpu][product]") {
  enum class Zeros { none, some, all };
  // Fewer stored rows than are asked for, and the first of them, NaN, never.
  struct Indexed {
    Indexed(int64_t count, int64_t width, double phase, at::ScalarType type, Zeros zeros)
        : stored(values(count * 2 / 3 + 2, width, phase), type), memory(count * 8) {
      const int64_t rows = stored.values().size(0) - 1;
      index = memory.last<int64_t>(count);
      std::vector<Tensor> read;
      for (int64_t i = 0; i < count; ++i) {
        const bool is_zeros = zeros == Zeros::all || (zeros == Zeros::some && i % 5 == 3);
        index[i] = is_zeros ? (i % 2 == 0 ? -1 : std::numeric_limits<int64_t>::min())
                            : 1 + (i * 7 + 2) % rows;
        read.push_back(is_zeros ? torch::zeros({width}, torch::kDouble)
                                : stored.values()[index[i]]);
      }
      matrix = torch::stack(read);
    }
    static Tensor values(int64_t rows, int64_t width, double phase) {
      Tensor result = wave({rows, width}, phase);
      result[0].fill_(kNaN);
      return result;
    }
    NumberRows rows() const { return {stored.numbers(), matrix.size(1), index}; }

    Stored stored;
    Guarded memory;
    int64_t* index;
    Tensor matrix;
  };
  struct Case {
    int64_t m, n, k;
    Zeros left, right;
  };
  const std::vector<Case> cases = {{2, 50, 201, Zeros::some, Zeros::none},
                                   {2, 50, 201, Zeros::none, Zeros::some},
                                   {7, 50, 201, Zeros::none, Zeros::none},
                                   {20, 50, 30, Zeros::some, Zeros::some},
                                   {20, 50, 201, Zeros::all, Zeros::some},
                                   {20, 50, 201, Zeros::some, Zeros::all},
                                   {256, 520, 201, Zeros::some, Zeros::some}};
  for (const auto& [m, n, k, left_zeros, right_zeros] : cases) {
    for (const auto& types : pairs_of_types()) {
      for (const auto& [form, form_name] : kForms) {
        const bool left_has_terms = form == Form::tn, right_has_terms = form != Form::nt;
        const Indexed left(
            left_has_terms ? k : m, left_has_terms ? m : k, 0, types.first, left_zeros);
        const Indexed right(
            right_has_terms ? k : n, right_has_terms ? n : k, 2, types.second, right_zeros);
        const Stored plain_left(left.matrix, types.first), plain_right(right.matrix, types.second);
        const NumberRows in_place_left = plain_left.last(left.matrix.size(0), left.matrix.size(1));
        const NumberRows in_place_right =
            plain_right.last(right.matrix.size(0), right.matrix.size(1));
        const ExpectedProduct expected =
            expected_product(left_has_terms ? left.matrix.t() : left.matrix,
                             right_has_terms ? right.matrix : right.matrix.t(),
                             unit_of_sums(types.second));
        for (const auto& [name, functions] : instruction_sets()) {
          INFO(name << " " << form_name << " " << types.first << " " << types.second << " m " << m
                    << " n " << n << " k " << k);
          Products products(*functions);
          const auto check = [&](const NumberRows& a, const NumberRows& b, int64_t gap) {
            CHECK(mismatch(products(form, a, b, m, n, k, {.gap = gap}), expected) == "");
          };
          check(left.rows(), right.rows(), 3);
          check(left.rows(), in_place_right, 0);
          check(in_place_left, right.rows(), 0);
        }
      }
    }
  }
}

TEST_CASE("product: NaN and inf go where they belong", "[cpu][product]") {
  constexpr int64_t kM = 20, kN = 51, kK = 200;
  Tensor left = wave({kM, kK}), right = wave({kK, kN}, 2);
  left[3][5] = kInf;
  left[4][0] = -kInf;
  left[kM - 1][kK - 1] = kNaN;
  left[7][11] = kInf;  // times 0
  left[8][20] = kInf;  // minus inf
  left[8][21] = -kInf;
  right[11].fill_(0);
  right[20][kN - 2] = kNaN;
  right[kK - 1][kN - 1] = -kInf;
  right[0][17] = kInf;
  for (const auto& types : pairs_of_types()) {
    for (const auto& [form, form_name] : kForms) {
      const Operands operands(form, types, left, right);
      const ExpectedProduct expected = operands.expected(kK);
      REQUIRE(expected.sums.isinf().any().item<bool>());
      REQUIRE(expected.sums.isfinite().any().item<bool>());
      for (const auto& [name, functions] : instruction_sets()) {
        INFO(name << " " << form_name << " " << types.first << " " << types.second);
        Products products(*functions);
        for (const int64_t m : {kM, int64_t{1}}) {
          for (const int64_t n : {kN, int64_t{1}}) {
            const Tensor actual =
                products(form, operands.left(m, kK), operands.right(n, kK), m, n, kK);
            CHECK(mismatch(actual, last(expected, m, n)) == "");
          }
        }
      }
    }
  }
}

TEST_CASE("product: a row of zeros times inf is NaN", "[cpu][product]") {
  const int64_t zeros[] = {-1, -1, -1};
  Tensor numbers = torch::ones({3, 3}, torch::kDouble);
  numbers[1].fill_(kInf);
  const Stored stored(numbers, torch::kFloat);
  for (const auto& [form, form_name] : kForms) {
    for (const auto& [name, functions] : instruction_sets()) {
      INFO(name << " " << form_name);
      Products products(*functions);
      const NumberRows none{stored.numbers(), 3, zeros}, some{stored.numbers(), 3, nullptr};
      const Tensor zero = torch::zeros({3, 3}, torch::kDouble);
      const Tensor values = stored.values();
      CHECK(mismatch(products(form, none, some, 3, 3, 3),
                     expected_product(zero, form == Form::nt ? values.t() : values)) == "");
      CHECK(mismatch(products(form, some, none, 3, 3, 3),
                     expected_product(form == Form::tn ? values.t() : values, zero)) == "");
    }
  }
}

TEST_CASE("product: what the scratch holds does not matter", "[cpu][product]") {
  for (const auto& types : pairs_of_types()) {
    for (const auto& [form, form_name] : kForms) {
      const Operands operands(form, types, 23, 77, 213);
      for (const auto& [name, functions] : instruction_sets()) {
        INFO(name << " " << form_name << " " << types.first << " " << types.second);
        Products products(*functions);
        for (const int64_t m : {1, 23}) {
          const auto with = [&](char scratch_byte) {
            return products(form,
                            operands.left(m, 213),
                            operands.right(77, 213),
                            m,
                            77,
                            213,
                            {.scratch_byte = scratch_byte});
          };
          CHECK(torch::equal(with('\xff'), with('\x3f')));
        }
      }
    }
  }
}

// Whatever the tiles, blocks and slices are.
TEST_CASE("product: a number of the result does not depend on the others", "[cpu][product]") {
  constexpr int64_t kM = 300, kN = 613, kK = 813;
  for (const auto& types : pairs_of_types()) {
    for (const auto& [form, form_name] : kForms) {
      const Operands operands(form, types, kM, kN, kK);
      for (const auto& [name, functions] : instruction_sets()) {
        Products products(*functions);
        const auto result = [&](int64_t m, int64_t n) {
          return products(form, operands.left(m, kK), operands.right(n, kK), m, n, kK);
        };
        const Tensor all = result(kM, kN);
        for (const int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 25, 252, 253}) {
          for (const int64_t n : {1, 3, 16, 29, 48, 61, 512, 513}) {
            INFO(name << " " << form_name << " " << types.first << " " << types.second
                      << " the last " << m << " rows and " << n << " columns");
            CHECK(torch::equal(result(m, n), all.slice(0, kM - m).slice(1, kN - n)));
          }
        }
      }
    }
  }
}

TEST_CASE("product: the bias is added, and the sum rounded once", "[cpu][product]") {
  constexpr int64_t kM = 21, kN = 67;
  for (const auto& types : pairs_of_types()) {
    for (const auto& [form, form_name] : kForms) {
      for (const int64_t k : {5, 200, 501}) {
        const Operands operands(form, types, kM, kN, k);
        const Stored bias(wave({1, kN}, 1), types.second);
        for (const auto& [name, functions] : instruction_sets()) {
          INFO(name << " " << form_name << " " << types.first << " " << types.second << " k " << k);
          Products products(*functions);
          const auto result = [&](const Products::Rest& rest) {
            return products(form, operands.left(kM, k), operands.right(kN, k), kM, kN, k, rest);
          };
          const Tensor sums = result({});
          const Tensor with_bias = sums + bias.values().to(sums.scalar_type());
          CHECK(torch::equal(result({.gap = 2, .bias = bias.numbers()}), with_bias));
          const Element narrow = bias.numbers().type;
          CHECK(torch::equal(result({.out = narrow}), sums.to(types.second)));
          CHECK(torch::equal(result({.gap = 1, .bias = bias.numbers(), .out = narrow}),
                             with_bias.to(types.second)));
        }
      }
    }
  }
}

// The instruction for two bfloat16 terms takes subnormal numbers for 0.
TEST_CASE("product: every number of a 16-bit type is read as it is", "[cpu][product]") {
  constexpr int64_t kAll = 65536;
  const Tensor bits = torch::arange(kAll, torch::kInt).to(torch::kShort).view({kAll, 1});
  for (const auto type : {torch::kBFloat16, torch::kHalf}) {
    const Stored one(torch::ones({1, 1}, torch::kDouble), type);
    const Stored wide_one(torch::ones({1, 1}, torch::kDouble), torch::kFloat);
    const Stored numbers(bits.view(type).to(torch::kDouble), type);
    for (const auto& [name, functions] : instruction_sets()) {
      INFO(name << " " << type);
      const bool flushes = type == torch::kBFloat16 && std::string(name) == "avx512_bf16";
      // + 0.0 makes a zero of -0, as a sum does.
      const auto column = [&](bool is_flushed) {
        const Tensor x = numbers.values() + 0.0;
        return ExpectedProduct{
            is_flushed ? torch::where(x.abs() < std::numeric_limits<float>::min(), 0.0, x) : x,
            torch::zeros({kAll, 1}, torch::kDouble)};
      };
      const auto row = [&](bool is_flushed) {
        const ExpectedProduct of = column(is_flushed);
        return ExpectedProduct{of.sums.view({1, kAll}), of.tolerance.view({1, kAll})};
      };
      Products products(*functions);
      const NumberRows of_one{numbers.numbers(), 1, nullptr},
          of_all{numbers.numbers(), kAll, nullptr};
      const NumberRows factor{one.numbers(), 1, nullptr},
          wide_factor{wide_one.numbers(), 1, nullptr};
      CHECK(mismatch(products(Form::nt, of_one, factor, kAll, 1, 1), column(flushes)) == "");
      CHECK(mismatch(products(Form::tn, of_all, factor, kAll, 1, 1), column(flushes)) == "");
      CHECK(mismatch(products(Form::nt, factor, of_one, 1, kAll, 1), row(flushes)) == "");
      CHECK(mismatch(products(Form::nn, factor, of_all, 1, kAll, 1), row(flushes)) == "");
      CHECK(mismatch(products(Form::nt, wide_factor, of_one, 1, kAll, 1), row(false)) == "");
      CHECK(mismatch(products(Form::nn, wide_factor, of_all, 1, kAll, 1), row(false)) == "");
    }
  }
}
