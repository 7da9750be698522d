// The matrix product: a kernel holds a tile of the result in registers while it runs along a slice of
// the sums.
//
//     for 512 columns of the result
//       for slices of up to 192 terms
//         pack the right operand's slice into panels, as wide as a tile          (384 KB, in L2)
//         for 252 rows of the result
//           find the left operand's rows (nt, nn) or pack its terms (tn)        (192 KB, in L2)
//           for panels of the right operand                                      (36 KB, in L1)
//             for tiles down the rows
//               tile of the result += left x panel
//
// A left operand whose rows hold their terms is read where it lies, through a pointer to each row:
// rows listed by an index cost no more than others. What lies across the sums, and the whole right
// operand, would be read from as many pages as there are terms; packed it is a single stream. A
// sum's order depends on its own length and on whether there are few rows, and on nothing else.
//
// docs/cpu_kernels.md has the measurements behind the constants.
#include "cpu/simd/product.h"

#include "cpu/simd/vector.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

namespace {

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

constexpr int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The tile is as large as the registers allow: rows x vectors of sums, the panel's vectors and one
// number of the left operand at a time. Of 32 registers 9 x 3 need 31, of 16 registers 6 x 2 need
// 15. Each step loads rows + vectors numbers for rows * vectors multiply-adds, so that the loads
// (two a cycle, as the multiply-adds) are never what the step waits for.
#if defined(__AVX512F__)
constexpr int kTileRows = 9;
constexpr int kTileVectors = 3;
#else
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
#endif

constexpr int64_t kPanelWidth = kTileVectors * kWidth;

// Terms of a slice. A panel of it (36 KB or 12 KB) must stay in L1 while the tiles run down the rows,
// and the result is loaded and stored once for each slice.
constexpr int64_t kTerms = 192;
constexpr int64_t kRows = 252;  // a multiple of either kTileRows
constexpr int64_t kColumns = 512;

// Packed rows and panels lie a little more than a power of two apart, which would put all of them
// into the same few lines of L1.
constexpr int64_t kSpacing = 16;
constexpr int64_t kWidenedStride = kTerms + kSpacing;
constexpr int64_t kTermPanel = kTerms * kTileRows + kSpacing;
constexpr int64_t kTermPanels = divide_up(kRows, kTileRows) + 1;
constexpr int64_t kLeftNumbers = max(kRows * kWidenedStride, kTermPanels* kTermPanel);
constexpr int64_t kRightNumbers = kTerms * (kColumns + kPanelWidth);

// What a row of zeros is read from.
alignas(64) constexpr float kZeros[kTerms] = {};

/// A stretch of rows, terms or columns.
struct Range {
  int64_t begin;
  int64_t size;
};

/// The rows of an operand, read as T.
template <typename T>
class Reader {
 public:
  explicit Reader(const NumberRows& rows)
      : data_(static_cast<const T*>(rows.numbers.data)), stride_(rows.stride), index_(rows.index) {}

  /// Row i, null for a row of zeros.
  const T* row(int64_t i) const {
    if (index_ == nullptr) {
      return data_ + i * stride_;
    }
    return index_[i] < 0 ? nullptr : data_ + index_[i] * stride_;
  }

 private:
  const T* data_;
  int64_t stride_;
  const int64_t* index_;
};

// ---- The left operand ---------------------------------------------------------------------------

/// Rows of the result, each with its terms: pointers[i] to those of row i, which `widened` takes where
/// they are not float32.
template <typename T>
void find_left_rows(
    const Reader<T>& reader, Range rows, Range terms, float* widened, const float** pointers) {
  for (int64_t i = 0; i < rows.size; ++i) {
    const T* from = reader.row(rows.begin + i);
    if (from == nullptr) {
      pointers[i] = kZeros;
    } else if constexpr (is_float32(static_cast<const T*>(nullptr))) {
      pointers[i] = from + terms.begin;
    } else {
      float* to = widened + i * kWidenedStride;
      pointers[i] = to;
      for (int64_t k = 0; k < terms.size; k += kWidth) {
        store(load_up_to(from + terms.begin + k, terms.size - k), to + k);
      }
    }
  }
}

/// Terms, each of all rows of the result: panels of `height` rows, packed[k * kTileRows + i], and
/// pointers[p] to panel p. A term is stored as a whole vector, whose end the next one overwrites.
template <typename T>
void pack_left_terms(const Reader<T>& reader,
                     Range rows,
                     Range terms,
                     int64_t height,
                     float* packed,
                     const float** pointers) {
  for (int64_t i = 0; i < rows.size; i += height) {
    float* to = packed;
    for (int64_t k = 0; k < terms.size; ++k, to += kTileRows) {
      const T* from = reader.row(terms.begin + k);
      store(from == nullptr ? Vector{} : load_up_to(from + rows.begin + i, rows.size - i), to);
    }
    *pointers++ = packed;
    packed += kTermPanel;
  }
}

// ---- Packing the right operand ------------------------------------------------------------------

/// Asks for a row's numbers before they are needed.
template <typename T>
void prefetch(const T* row, Range numbers) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; row != nullptr && i < numbers.size; i += kLine) {
    __builtin_prefetch(row + numbers.begin + i);
  }
}

/// Calls body(first column, vectors) for each panel of a slice's columns. They are as wide as the
/// kernel's tile or one vector narrower: a last panel of one vector would run at half the speed.
template <typename Body>
void for_panels(int64_t columns, const Body& body) {
  const int64_t vectors = divide_up(columns, kWidth);
  const int64_t panels = divide_up(vectors, kTileVectors);
  for (int64_t p = 0, first = 0; p < panels; ++p) {
    const int64_t width = vectors / panels + (p < vectors % panels ? 1 : 0);
    body(first * kWidth, width);
    first += width;
  }
}

/// Terms of the result's columns into panels; in the panel that starts at column j,
/// right[j * terms + k * width + c].
template <typename T>
void pack_right_terms(const Reader<T>& rows, Range columns, Range terms, float* right) {
  constexpr int64_t kAhead = 8;  // rows: a kilobyte or two of packing for the memory to answer in
  for (int64_t k = 0; k < terms.size; ++k) {
    const T* from = rows.row(terms.begin + k);
    if (k + kAhead < terms.size) {
      prefetch(rows.row(terms.begin + k + kAhead), columns);
    }
    for_panels(columns.size, [&](int64_t j, int64_t vectors) {
      float* to = right + j * terms.size + k * vectors * kWidth;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t column = j + v * kWidth;
        store(from == nullptr ? Vector{}
                              : load_up_to(from + columns.begin + column, columns.size - column),
              to + v * kWidth);
      }
    });
  }
}

using Eight = float __attribute__((vector_size(32)));

/// Turns eight rows of eight numbers into its eight columns.
inline void transpose(Eight (&rows)[8]) {
  Eight a[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  Eight b[8];
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] =
          __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

inline Eight load_eight(const float* from) {
  Eight v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename T>
inline Eight load_eight(const T* from) {
  T numbers[kWidth] = {};
  std::memcpy(numbers, from, 8 * sizeof(T));
  const Vector wide = load(numbers);
  Eight v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

/// Columns of the result, each with its terms, into the same panels.
template <typename T>
void pack_right_rows(const Reader<T>& rows, Range columns, Range terms, float* right) {
  constexpr int64_t kBlock = 8;
  for_panels(columns.size, [&](int64_t j, int64_t vectors) {
    const int64_t width = vectors * kWidth;
    for (int64_t c = 0; c < width; c += kBlock) {
      const T* from[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) {
        const int64_t column = j + c + i;
        from[i] = column < columns.size ? rows.row(columns.begin + column) : nullptr;
        if (column + kBlock < columns.size) {
          prefetch(rows.row(columns.begin + column + kBlock), terms);
        }
      }
      float* to = right + j * terms.size + c;
      for (int64_t k = 0; k < terms.size; k += kBlock) {
        const int64_t count = min(terms.size - k, kBlock);
        Eight block[kBlock];
        for (int64_t i = 0; i < kBlock; ++i) {
          if (from[i] == nullptr) {
            block[i] = Eight{};
          } else if (count == kBlock) {
            block[i] = load_eight(from[i] + terms.begin + k);
          } else {
            T numbers[kBlock] = {};
            std::memcpy(numbers, from[i] + terms.begin + k, count * sizeof(T));
            block[i] = load_eight(numbers);
          }
        }
        transpose(block);
        for (int64_t i = 0; i < count; ++i) {
          std::memcpy(to + (k + i) * width, &block[i], sizeof block[i]);
        }
      }
    }
  });
}

// ---- The kernel ---------------------------------------------------------------------------------

/// What a tile reads and writes.
struct Tile {
  const float* const* left;  // of each row its terms, or the panel
  const float* right;
  int64_t terms;
  float* out;
  int64_t out_stride;
  bool add;  // to what out holds
};

/// A tile of `rows` x `vectors` sums. Anything more than loops over whole vectors makes the compiler
/// keep some of the sums in memory.
template <bool left_by_term, int rows, int vectors>
void multiply_tile(const Tile& tile) {
  Vector sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sums[i][v] = tile.add ? load(tile.out + i * tile.out_stride + v * kWidth) : Vector{};
    }
  }
  const float* left[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    left[i] = left_by_term ? tile.left[0] + i : tile.left[i];
  }
  const float* right = tile.right;
  for (int64_t k = 0; k < tile.terms; ++k) {
    Vector columns[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      columns[v] = load(right + v * kWidth);
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const float number = left[i][left_by_term ? k * kTileRows : k];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sums[i][v] += number * columns[v];
      }
    }
    right += vectors * kWidth;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      store(sums[i][v], tile.out + i * tile.out_stride + v * kWidth);
    }
  }
}

using MultiplyTile = void (*)(const Tile&);

/// The kernels by number of vectors - 1 and number of rows - 1.
template <bool left_by_term>
struct Kernels {
  MultiplyTile kernels[kTileVectors][kTileRows];

  constexpr Kernels() : kernels{} { set_vectors<kTileVectors>(); }

 private:
  template <int vectors>
  constexpr void set_vectors() {
    if constexpr (vectors > 0) {
      set_rows<vectors, kTileRows>();
      set_vectors<vectors - 1>();
    }
  }

  template <int vectors, int rows>
  constexpr void set_rows() {
    if constexpr (rows > 0) {
      kernels[vectors - 1][rows - 1] = multiply_tile<left_by_term, rows, vectors>;
      set_rows<vectors, rows - 1>();
    }
  }
};

template <bool left_by_term>
constexpr Kernels<left_by_term> kKernels;

/// A tile whose last vector is wider than the result: by way of a buffer, in which the sums go on as
/// they do elsewhere.
void multiply_last_tile(MultiplyTile multiply, const Tile& tile, int64_t rows, int64_t columns) {
  alignas(64) float buffer[kTileRows * kPanelWidth] = {};
  const int64_t bytes = columns * static_cast<int64_t>(sizeof(float));
  Tile in_buffer = tile;
  in_buffer.out = buffer;
  in_buffer.out_stride = kPanelWidth;
  for (int64_t i = 0; tile.add && i < rows; ++i) {
    std::memcpy(buffer + i * kPanelWidth, tile.out + i * tile.out_stride, bytes);
  }
  multiply(in_buffer);
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(tile.out + i * tile.out_stride, buffer + i * kPanelWidth, bytes);
  }
}

/// Tiles of nearly equal height, so that no last one is left with a single row.
int64_t tile_height(int64_t rows) {
  return divide_up(rows, divide_up(rows, kTileRows));
}

/// out (+)= the product of a slice of the left operand and a packed one of the right.
template <bool left_by_term>
void multiply_slices(const float* const* left,
                     const float* right,
                     int64_t rows,
                     int64_t columns,
                     int64_t terms,
                     float* out,
                     int64_t out_stride,
                     bool add) {
  const int64_t height = tile_height(rows);
  for_panels(columns, [&](int64_t j, int64_t vectors) {
    const int64_t panel_columns = min(columns - j, vectors * kWidth);
    for (int64_t i = 0; i < rows; i += height) {
      const int64_t tile_rows = min(height, rows - i);
      for (int64_t r = i + height; r < min(i + 2 * height, rows); ++r) {  // the next tile
        prefetch(out + r * out_stride, Range{j, panel_columns});
      }
      const auto multiply = kKernels<left_by_term>.kernels[vectors - 1][tile_rows - 1];
      const Tile tile{left_by_term ? left + i / height : left + i,
                      right + j * terms,
                      terms,
                      out + i * out_stride + j,
                      out_stride,
                      add};
      if (panel_columns == vectors * kWidth) {
        multiply(tile);
      } else {
        multiply_last_tile(multiply, tile, tile_rows, panel_columns);
      }
    }
  });
}

// ---- Few rows -----------------------------------------------------------------------------------

// Packing a number costs as much as this many rows' multiply-adds with it, so that for fewer the
// right operand is better read where it lies. Its rows must hold their terms (nt).
constexpr int64_t kFewRows = 8;
// Rows and columns whose sums a step keeps in registers.
constexpr int kDotRows = 4;
constexpr int kDotColumns = kTileVectors;

/// out[i][j] = <left[i], right[j]> for a step's rows and columns; a vector of sums each, added at the
/// end.
template <int rows, int columns, typename L, typename R>
void dot_step(
    const L* const* left, const R* const* right, int64_t terms, float* out, int64_t stride) {
  Vector sums[rows][columns] = {};
  const auto add = [&](int64_t k, const auto& load_terms_at) {
    const auto load_terms = [&](const auto* row) {
      return row == nullptr ? Vector{} : load_terms_at(row + k);
    };
    Vector of_columns[columns];
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) {
      of_columns[j] = load_terms(right[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const Vector of_row = load_terms(left[i]);
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j) {
        sums[i][j] += of_row * of_columns[j];
      }
    }
  };
  int64_t k = 0;
  for (; k + kWidth <= terms; k += kWidth) {
    add(k, [](const auto* from) { return load(from); });
  }
  if (k < terms) {
    add(k, [&](const auto* from) { return load_part(from, terms - k); });
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      out[i * stride + j] = sum(sums[i][j]);
    }
  }
}

template <int rows, typename L, typename R>
void dot_columns(const L* const* left,
                 const Reader<R>& right,
                 const ProductCall& call,
                 float* out) {
  const R* columns[kDotColumns];
  int64_t j = 0;
  for (; j + kDotColumns <= call.n; j += kDotColumns) {
    for (int c = 0; c < kDotColumns; ++c) {
      columns[c] = right.row(j + c);
    }
    dot_step<rows, kDotColumns>(left, columns, call.k, out + j, call.out_stride);
  }
  for (; j < call.n; ++j) {
    columns[0] = right.row(j);
    dot_step<rows, 1>(left, columns, call.k, out + j, call.out_stride);
  }
}

/// The product nt of few rows.
template <typename L, typename R>
void product_of_few_rows(const ProductCall& call) {
  const Reader<L> left_reader(call.left);
  const Reader<R> right_reader(call.right);
  const L* left[kFewRows];
  for (int64_t i = 0; i < call.m; ++i) {
    left[i] = left_reader.row(i);
  }
  int64_t i = 0;
  for (; i + kDotRows <= call.m; i += kDotRows) {
    dot_columns<kDotRows>(left + i, right_reader, call, call.out + i * call.out_stride);
  }
  for (; i < call.m; ++i) {
    dot_columns<1>(left + i, right_reader, call, call.out + i * call.out_stride);
  }
}

// ---- Any number of rows -------------------------------------------------------------------------

template <Form form, typename L, typename R>
void product_of(const ProductCall& call) {
  constexpr bool kLeftByTerm = form == Form::tn;
  const Reader<L> left_reader(call.left);
  const Reader<R> right_reader(call.right);
  float* packed_left = call.scratch;
  float* packed_right = call.scratch + kLeftNumbers;
  const float* left[kRows];
  const int64_t slices = divide_up(call.k, kTerms);
  const int64_t slice = divide_up(call.k, slices);
  for (int64_t j = 0; j < call.n; j += kColumns) {
    const Range columns{j, min(kColumns, call.n - j)};
    for (int64_t k = 0; k < call.k; k += slice) {
      const Range terms{k, min(slice, call.k - k)};
      if constexpr (form == Form::nt) {
        pack_right_rows(right_reader, columns, terms, packed_right);
      } else {
        pack_right_terms(right_reader, columns, terms, packed_right);
      }
      for (int64_t i = 0; i < call.m; i += kRows) {
        const Range rows{i, min(kRows, call.m - i)};
        if constexpr (kLeftByTerm) {
          pack_left_terms(left_reader, rows, terms, tile_height(rows.size), packed_left, left);
        } else {
          find_left_rows(left_reader, rows, terms, packed_left, left);
        }
        multiply_slices<kLeftByTerm>(left,
                                     packed_right,
                                     rows.size,
                                     columns.size,
                                     terms.size,
                                     call.out + i * call.out_stride + j,
                                     call.out_stride,
                                     k > 0);
      }
    }
  }
}

}  // namespace

int64_t product_scratch() {
  return kLeftNumbers + kRightNumbers;
}

void product(const ProductCall& call) {
  if (call.k == 0) {
    for (int64_t i = 0; i < call.m; ++i) {
      std::memset(call.out + i * call.out_stride, 0, call.n * sizeof(float));
    }
    return;
  }
  const bool few_rows = call.m <= kFewRows;
  with_type(call.left.numbers.type, [&]<typename L>(const L*) {
    with_type(call.right.numbers.type, [&]<typename R>(const R*) {
      switch (call.form) {
        case Form::nt:
          return few_rows ? product_of_few_rows<L, R>(call) : product_of<Form::nt, L, R>(call);
        case Form::nn:
          return product_of<Form::nn, L, R>(call);
        case Form::tn:
          return product_of<Form::tn, L, R>(call);
      }
    });
  });
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
