// The matrix products of every instruction set against float64 ones.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "simd/catch2.h"
#include "simd/expected_product.h"
#include "simd/instruction_sets.h"
#include "simd/memory.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::cpu::Element;
using torchmoe::cpu::Form;
using torchmoe::cpu::InstructionSet;
using torchmoe::cpu::NumberRows;
using torchmoe::cpu::Numbers;
using torchmoe::cpu::ProductCall;
using torchmoe::cpu::Simd;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using Types = std::pair<Element, Element>;

const Types kFloats = {Element::float32, Element::float32};
const Types kBFloat16s = {Element::bfloat16, Element::bfloat16};

std::vector<Types> pairs_of_types() {
  std::vector<Types> pairs = {kFloats, {Element::float64, Element::float64}};
  for (const auto type : {Element::bfloat16, Element::float16}) {
    pairs.insert(pairs.end(), {{type, type}, {Element::float32, type}});
  }
  return pairs;
}

/// The instruction sets, with the emulated tile registers where the product is on them.
std::vector<InstructionSet> sets_of(const Types& types) {
  return types == kBFloat16s ? sets_with_tiles() : torchmoe::cpu::instruction_sets();
}

std::string text(const Types& types) {
  return std::string(name_of(types.first)) + " " + name_of(types.second);
}

/// The type of the sums of a product with this right operand.
Element sums_of(Element right) {
  return right == Element::float64 ? Element::float64 : Element::float32;
}

/// The last rows and columns of what is expected.
ExpectedProduct last(const ExpectedProduct& expected, int64_t m, int64_t n) {
  return {expected.sums.last(m, n), expected.tolerance.last(m, n)};
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

  Matrix operator()(Form form,
                    const NumberRows& left,
                    const NumberRows& right,
                    int64_t m,
                    int64_t n,
                    int64_t k,
                    const Rest& rest) {
    const ProductCall call{form, left, right, m, n, k, rest.bias, {}, n + rest.gap, nullptr};
    return with_stored(rest.out.value_or(sums_of(right.numbers.type)),
                       [&]<typename Out>() { return written<Out>(call, rest); });
  }
  Matrix operator()(
      Form form, const NumberRows& left, const NumberRows& right, int64_t m, int64_t n, int64_t k) {
    return (*this)(form, left, right, m, n, k, Rest{});
  }

 private:
  template <typename Out>
  Matrix written(ProductCall call, const Rest& rest) {
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
    return out.values();
  }

  const Simd& simd_;
  std::unique_ptr<Guarded> scratch_;
  int64_t bytes_ = -1;
};

/// Operands of a form, of which a test uses the last rows and elements.
class Operands {
 public:
  Operands(Form form, const Types& types, int64_t m, int64_t n, int64_t k)
      : Operands(form, types, wave_matrix(m, k, 0), wave_matrix(k, n, 2)) {}

  /// left [m, k], right [k, n].
  Operands(Form form, const Types& types, const Matrix& left, const Matrix& right)
      : form_(form),
        left_(form == Form::tn ? left.transposed() : left, types.first),
        right_(form == Form::nt ? right.transposed() : right, types.second),
        unit_(unit_of_sums(types.second)) {}

  ExpectedProduct expected(int64_t k) const {
    const Matrix left = form_ == Form::tn ? left_.values().transposed() : left_.values();
    const Matrix right = form_ == Form::nt ? right_.values().transposed() : right_.values();
    return expected_product(left.last(left.rows(), k), right.last(k, right.columns()), unit_);
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
  std::vector<ExpectedProduct> expected;
  for (const auto& [form, form_name] : kForms) {
    const Operands operands(form, types, largest(ms), largest(ns), largest(ks));
    for (size_t i = 0; i < ks.size(); ++i) {
      const int64_t k = ks[i];
      if (form == kForms[0].first) {
        expected.push_back(operands.expected(k));  // the same for every form
      }
      for (const auto& [name, functions] : sets_of(types)) {
        Products products(*functions);
        for (const int64_t m : ms) {
          for (const int64_t n : ns) {
            INFO(name << " " << form_name << " " << text(types) << " m " << m << " n " << n << " k "
                      << k);
            const Matrix actual = products(
                form, operands.left(m, k), operands.right(n, k), m, n, k, {.gap = (m + n + k) % 4});
            CHECK(mismatch(actual, last(expected[i], m, n)) == "");
          }
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("product: sizes around those of a tile", "[product]") {
  check_sizes(kFloats,
              {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 19},
              {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 65, 97},
              {0, 1, 2, 7, 8, 9, 15, 16, 17, 33});
}

TEST_CASE("product: every pair of types", "[product]") {
  for (const auto& types : pairs_of_types()) {
    check_sizes(types, {1, 6, 7, 9, 10, 19}, {1, 8, 15, 17, 33, 48, 65}, {1, 8, 9, 33});
  }
}

TEST_CASE("product: sizes around those of a block", "[product]") {
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
    check_sizes(types, {253}, {513}, {types == kBFloat16s ? 515 : 257});
    // As much as is packed at once.
    check_sizes(types, {252, 256}, {17}, {512, 1024});
    check_sizes(types, {7, 10}, {512}, {128, 256, 512});
  }
  check_sizes(kFloats, {1, 2, 3, 4, 5, 8}, {512, 1000}, {384, 385, 1030});
}

TEST_CASE("product: sizes around those of tile registers", "[product]") {
  const Sizes tiles = {1, 2, 15, 16, 17, 31, 32, 33, 49};
  check_sizes(kBFloat16s, tiles, tiles, {1, 31, 32, 33, 65});
  check_sizes(kBFloat16s, {33}, {33}, {511, 512, 513, 545, 1025});
  check_sizes(kBFloat16s, {256, 257, 513}, {17, 33}, {33, 417});
}

TEST_CASE("product: no terms give zeros", "[product]") {
  for (const auto& [form, form_name] : kForms) {
    for (const auto& [name, functions] : sets_of(kBFloat16s)) {
      INFO(name << " " << form_name);
      const NumberRows none{{nullptr, Element::bfloat16}, 0, nullptr};
      const Matrix out = Products(*functions)(form, none, none, 3, 50, 0, {.gap = 2});
      CHECK(out.equals(Matrix(3, 50)));
      const Stored bias(wave_matrix(1, 50), Element::bfloat16);
      Matrix rows(3, 50);
      for (int64_t i = 0; i < 3; ++i) {
        std::copy_n(bias.values().row(0), 50, rows.row(i));
      }
      CHECK(Products(*functions)(
                form, none, none, 3, 50, 0, {.bias = bias.numbers(), .out = Element::bfloat16})
                .equals(rows));
    }
  }
}

TEST_CASE("product: rows by index", "[product]") {
  enum class Zeros { none, some, all };
  // Fewer stored rows than are asked for, and the first of them, NaN, never.
  struct Indexed {
    Indexed(int64_t count, int64_t width, double phase, Element type, Zeros zeros)
        : stored(values(count * 2 / 3 + 2, width, phase), type),
          memory(count * 8),
          index(memory.last<int64_t>(count)),
          matrix(count, width) {
      const int64_t rows = stored.values().rows() - 1;
      for (int64_t i = 0; i < count; ++i) {
        const bool is_zeros = zeros == Zeros::all || (zeros == Zeros::some && i % 5 == 3);
        index[i] = is_zeros ? (i % 2 == 0 ? -1 : std::numeric_limits<int64_t>::min())
                            : 1 + (i * 7 + 2) % rows;
        if (!is_zeros) {
          std::copy_n(stored.values().row(index[i]), width, matrix.row(i));
        }
      }
    }
    static Matrix values(int64_t rows, int64_t width, double phase) {
      Matrix result = wave_matrix(rows, width, phase);
      std::fill_n(result.row(0), width, kNaN);
      return result;
    }
    NumberRows rows() const { return {stored.numbers(), matrix.columns(), index}; }

    Stored stored;
    Guarded memory;
    int64_t* index;
    Matrix matrix;
  };
  struct Case {
    int64_t m, n, k;
    Zeros left, right;
  };
  const std::vector<Case> cases = {{2, 50, 201, Zeros::some, Zeros::none},
                                   {2, 50, 201, Zeros::none, Zeros::some},
                                   {7, 50, 201, Zeros::none, Zeros::none},
                                   {20, 50, 30, Zeros::some, Zeros::some},
                                   {34, 50, 64, Zeros::some, Zeros::some},
                                   {34, 50, 64, Zeros::none, Zeros::none},
                                   {20, 50, 201, Zeros::all, Zeros::some},
                                   {20, 50, 201, Zeros::some, Zeros::all},
                                   {256, 20, 201, Zeros::some, Zeros::some},
                                   {20, 520, 201, Zeros::some, Zeros::some}};
  for (const auto& [m, n, k, left_zeros, right_zeros] : cases) {
    for (const auto& types : pairs_of_types()) {
      for (const auto& [form, form_name] : kForms) {
        const bool left_has_terms = form == Form::tn, right_has_terms = form != Form::nt;
        const Indexed left(
            left_has_terms ? k : m, left_has_terms ? m : k, 0, types.first, left_zeros);
        const Indexed right(
            right_has_terms ? k : n, right_has_terms ? n : k, 2, types.second, right_zeros);
        const Stored plain_left(left.matrix, types.first), plain_right(right.matrix, types.second);
        const NumberRows in_place_left = plain_left.last(left.matrix.rows(), left.matrix.columns());
        const NumberRows in_place_right =
            plain_right.last(right.matrix.rows(), right.matrix.columns());
        const ExpectedProduct expected =
            expected_product(left_has_terms ? left.matrix.transposed() : left.matrix,
                             right_has_terms ? right.matrix : right.matrix.transposed(),
                             unit_of_sums(types.second));
        for (const auto& [name, functions] : sets_of(types)) {
          INFO(name << " " << form_name << " " << text(types) << " m " << m << " n " << n << " k "
                    << k);
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

TEST_CASE("product: NaN and inf go where they belong", "[product]") {
  constexpr int64_t kM = 20, kN = 51, kK = 200;
  Matrix left = wave_matrix(kM, kK), right = wave_matrix(kK, kN, 2);
  left(3, 5) = kInf;
  left(4, 0) = -kInf;
  left(kM - 1, kK - 1) = kNaN;
  left(7, 11) = kInf;  // times 0
  left(8, 20) = kInf;  // minus inf
  left(8, 21) = -kInf;
  std::fill_n(right.row(11), kN, 0);
  right(20, kN - 2) = kNaN;
  right(kK - 1, kN - 1) = -kInf;
  right(0, 17) = kInf;
  for (const auto& types : pairs_of_types()) {
    for (const auto& [form, form_name] : kForms) {
      const Operands operands(form, types, left, right);
      const ExpectedProduct expected = operands.expected(kK);
      const auto& sums = expected.sums.numbers();
      REQUIRE(std::any_of(sums.begin(), sums.end(), [](double x) { return std::isinf(x); }));
      REQUIRE(std::any_of(sums.begin(), sums.end(), [](double x) { return std::isfinite(x); }));
      for (const auto& [name, functions] : sets_of(types)) {
        INFO(name << " " << form_name << " " << text(types));
        Products products(*functions);
        for (const int64_t m : {kM, int64_t{1}}) {
          for (const int64_t n : {kN, int64_t{1}}) {
            const Matrix actual =
                products(form, operands.left(m, kK), operands.right(n, kK), m, n, kK);
            CHECK(mismatch(actual, last(expected, m, n)) == "");
          }
        }
      }
    }
  }
}

TEST_CASE("product: a row of zeros times inf is NaN", "[product]") {
  const int64_t zeros[] = {-1, -1, -1};
  Matrix numbers(3, 3, 1);
  std::fill_n(numbers.row(1), 3, kInf);
  const Matrix zero(3, 3), turned = numbers.transposed();
  for (const auto& types : {kFloats, kBFloat16s}) {
    const Stored stored(numbers, types.first);
    for (const auto& [form, form_name] : kForms) {
      for (const auto& [name, functions] : sets_of(types)) {
        INFO(name << " " << form_name << " " << text(types));
        Products products(*functions);
        const NumberRows none{stored.numbers(), 3, zeros}, some{stored.numbers(), 3, nullptr};
        CHECK(mismatch(products(form, none, some, 3, 3, 3),
                       expected_product(zero, form == Form::nt ? turned : numbers)) == "");
        CHECK(mismatch(products(form, some, none, 3, 3, 3),
                       expected_product(form == Form::tn ? turned : numbers, zero)) == "");
      }
    }
  }
}

TEST_CASE("product: what the scratch holds does not matter", "[product]") {
  for (const auto& types : pairs_of_types()) {
    for (const auto& [form, form_name] : kForms) {
      const Operands operands(form, types, 23, 77, 213);
      for (const auto& [name, functions] : sets_of(types)) {
        INFO(name << " " << form_name << " " << text(types));
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
          CHECK(with('\xff').equals(with('\x3f')));
        }
      }
    }
  }
}

// Whatever the tiles, blocks and slices are.
TEST_CASE("product: a number of the result does not depend on the others", "[product]") {
  constexpr int64_t kM = 260, kN = 525, kK = 401;
  std::vector<std::pair<int64_t, int64_t>> sizes = {
      {25, 16}, {9, 512}, {10, 513}, {252, 48}, {253, 61}};
  for (const int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 17, 32, 33}) {
    for (const int64_t n : {1, 3, 16, 29, 33, 48, 61}) {
      sizes.emplace_back(m, n);
    }
  }
  for (const auto& types : pairs_of_types()) {
    for (const auto& [form, form_name] : kForms) {
      const Operands operands(form, types, kM, kN, kK);
      for (const auto& [name, functions] : sets_of(types)) {
        Products products(*functions);
        const auto result = [&](int64_t m, int64_t n) {
          return products(form, operands.left(m, kK), operands.right(n, kK), m, n, kK);
        };
        const Matrix all = result(kM, kN);
        for (const auto& [m, n] : sizes) {
          INFO(name << " " << form_name << " " << text(types) << " the last " << m << " rows and "
                    << n << " columns");
          CHECK(result(m, n).equals(all.last(m, n)));
        }
      }
    }
  }
}

TEST_CASE("product: the bias is added, and the sum rounded once", "[product]") {
  constexpr int64_t kM = 21, kN = 67;
  for (const auto& types : pairs_of_types()) {
    for (const auto& [form, form_name] : kForms) {
      for (const int64_t k : {5, 200, 1100}) {
        const Operands operands(form, types, kM, kN, k);
        const Stored bias(wave_matrix(1, kN, 1), types.second);
        for (const auto& [name, functions] : sets_of(types)) {
          INFO(name << " " << form_name << " " << text(types) << " k " << k);
          Products products(*functions);
          const auto result = [&](const Products::Rest& rest) {
            return products(form, operands.left(kM, k), operands.right(kN, k), kM, kN, k, rest);
          };
          const Matrix sums = result({});
          Matrix with_bias = sums;
          for (int64_t i = 0; i < sums.size(); ++i) {
            with_bias.numbers()[i] += bias.values().numbers()[i % kN];
          }
          with_bias = with_bias.as(sums_of(types.second));
          CHECK(result({.gap = 2, .bias = bias.numbers()}).equals(with_bias));
          CHECK(result({.out = types.second}).equals(sums.as(types.second)));
          CHECK(result({.gap = 1, .bias = bias.numbers(), .out = types.second})
                    .equals(with_bias.as(types.second)));
        }
      }
    }
  }
}

// The instructions for two bfloat16 terms take subnormal numbers for 0.
TEST_CASE("product: every number of a 16-bit type is read as it is", "[product]") {
  constexpr int64_t kAll = 65536;
  const auto check = [&]<typename T>() {
    const Element type = element_of<T>();
    Matrix all(kAll, 1);
    for (int64_t i = 0; i < kAll; ++i) {
      all(i, 0) = T::kFormat.value(static_cast<uint32_t>(i));
    }
    const Stored numbers(all, type), one(Matrix(1, 1, 1), type),
        wide_one(Matrix(1, 1, 1), Element::float32);
    for (const auto& [name, functions] : sets_of({type, type})) {
      INFO(name << " " << name_of(type));
      const std::string set = name;
      const bool flushes =
          type == Element::bfloat16 && (set == "avx512_bf16" || set == "neon_bf16" ||
                                        set == "amx" || set.starts_with("emulated_tiles"));
      const auto column = [&](bool is_flushed) {
        const Matrix read = all.map([&](double x) {
          return is_flushed && std::fabs(x) < std::numeric_limits<float>::min() ? 0 : x;
        });
        return ExpectedProduct{read, Matrix(kAll, 1)};
      };
      const auto row = [&](bool is_flushed) {
        return ExpectedProduct{column(is_flushed).sums.transposed(), Matrix(1, kAll)};
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
  };
  check.template operator()<BFloat16>();
  check.template operator()<Float16>();
}
