// Whole numbers that count rows, columns and terms.
#pragma once

#include <cstdint>

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

constexpr int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

/// A stretch of rows, terms or columns.
struct Range {
  int64_t begin;
  int64_t size;
};

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
