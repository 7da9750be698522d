// The memory that the functions of csrc/cpu/simd read and write.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <unistd.h>
#include <vector>

#include "cpu/simd/simd.h"
#include "simd/matrix.h"

#include <sys/mman.h>

namespace torchmoe::test {

/// Of a rounding to float32: half its epsilon.
constexpr double kUnit = 0x1p-24;

template <typename T>
cpu::Numbers numbers(const T* data) {
  return {data, element_of<T>()};
}
template <typename T>
cpu::MutableNumbers numbers(T* data) {
  return {data, element_of<T>()};
}

/// Memory that ends where a page begins that nobody may touch: reading or writing past the end is a
/// crash. It is filled with 0xff bytes, which are NaN in every type.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t usable = (bytes + page - 1) / page * page;
    const size_t all = usable + page;
    void* begin = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) {
      throw std::runtime_error("mmap failed");
    }
    memory_.reset(static_cast<char*>(begin), [all](char* memory) { munmap(memory, all); });
    end_ = memory_.get() + usable;
    if (mprotect(end_, page, PROT_NONE) != 0) {
      throw std::runtime_error("mprotect failed");
    }
    std::fill(memory_.get(), end_, '\xff');
  }

  /// The last `count` elements.
  template <typename T>
  T* last(int64_t count) const {
    return reinterpret_cast<T*>(end_ - count * sizeof(T));
  }
  char* begin() const { return memory_.get(); }
  char* end() const { return end_; }

 private:
  std::shared_ptr<char> memory_;
  char* end_;
};

/// A matrix stored in one of the types at the end of guarded memory.
class Stored {
 public:
  Stored(const Matrix& matrix, cpu::Element type)
      : values_(matrix.as(type)),
        type_(type),
        size_(size_of(type)),
        memory_(matrix.size() * size_) {
    with_stored(type, [&]<typename T>() {
      T* to = memory_.last<T>(matrix.size());
      for (const double x : values_.numbers()) {
        *to++ = static_cast<T>(x);
      }
    });
  }

  /// What is stored.
  const Matrix& values() const { return values_; }

  cpu::Numbers numbers() const { return {first(values_.size()), type_}; }

  /// The last elements of the last rows: what comes before them belongs to others.
  cpu::NumberRows last(int64_t rows, int64_t numbers) const {
    const int64_t width = values_.columns();
    const int64_t used = std::max<int64_t>(0, (rows - 1) * width + numbers);
    return {{first(used), type_}, width, nullptr};
  }

 private:
  static int64_t size_of(cpu::Element type) {
    return with_stored(type, []<typename T>() { return static_cast<int64_t>(sizeof(T)); });
  }

  const void* first(int64_t numbers) const { return memory_.last<char>(numbers * size_); }

  Matrix values_;
  cpu::Element type_;
  int64_t size_;
  Guarded memory_;
};

/// Where a matrix is to be written, row i at i * stride, at the end of guarded memory.
template <typename T>
class Written {
 public:
  Written(int64_t rows, int64_t columns, int64_t stride)
      : rows_(rows),
        columns_(columns),
        stride_(stride),
        memory_((kBefore + std::max<int64_t>(0, (rows - 1) * stride + columns)) * sizeof(T)) {}

  T* data() const { return memory_.last<T>(rows_ == 0 ? 0 : (rows_ - 1) * stride_ + columns_); }

  T at(int64_t i, int64_t j) const { return data()[i * stride_ + j]; }

  Matrix values() const {
    Matrix result(rows_, columns_);
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < columns_; ++j) {
        result(i, j) = static_cast<double>(at(i, j));
      }
    }
    return result;
  }

  /// Whether what lies before and between the rows is as it was.
  bool is_only_matrix_written() const {
    const char* from = memory_.begin();
    for (int64_t i = 0; columns_ > 0 && i < rows_; ++i) {
      const auto* row = reinterpret_cast<const char*>(data() + i * stride_);
      if (!is_untouched(from, row)) {
        return false;
      }
      from = row + columns_ * sizeof(T);
    }
    return is_untouched(from, memory_.end());
  }

 private:
  static constexpr int64_t kBefore = 64;

  static bool is_untouched(const char* from, const char* to) {
    return from == to || (*from == '\xff' && std::memcmp(from, from + 1, to - from - 1) == 0);
  }

  int64_t rows_;
  int64_t columns_;
  int64_t stride_;
  Guarded memory_;
};

}  // namespace torchmoe::test
