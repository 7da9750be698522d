// The tile registers of cpu/simd/tiles.h in memory, for the tests of the product on them.
//
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS: products are
// added by fused operations, the lower and the upper terms of the lanes by themselves; subnormal
// operands and results are 0. What no row of a register has been given is NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

constexpr int64_t kTileSize = 16;

class Tiles {
 public:
  explicit Tiles(int64_t rows) : rows_(rows) {
    std::memset(sums_, 0xff, sizeof sums_);
    std::memset(left_, 0xff, sizeof left_);
    std::memset(right_, 0xff, sizeof right_);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int i>
  void load_left(const void* from, int64_t stride) {
    load(from, stride, rows_, left_[i]);
  }
  template <int j>
  void load_right(const void* from, int64_t stride) {
    load(from, stride, kTileSize, right_[j]);
  }
  template <int i, int j>
  void load_sums(const void* from, int64_t stride) {
    load(from, stride, rows_, sums_[i][j]);
  }
  template <int i, int j>
  void store_sums(void* to, int64_t stride) {
    for (int64_t m = 0; m < rows_; ++m) {
      std::memcpy(static_cast<char*>(to) + m * stride, sums_[i][j][m], sizeof sums_[i][j][m]);
    }
  }
  template <int i, int j>
  void clear_sums() {
    std::memset(sums_[i][j], 0, sizeof sums_[i][j]);
  }

  template <int i, int j>
  void multiply_add() {
    for (int64_t m = 0; m < rows_; ++m) {
      float lower[kTileSize] = {}, upper[kTileSize] = {};
      for (int64_t k = 0; k < kTileSize; ++k) {
        const uint32_t a = left_[i][m][k];
        for (int64_t n = 0; n < kTileSize; ++n) {
          const uint32_t b = right_[j][k][n];
          lower[n] = flushed(__builtin_fmaf(lower_term(a), lower_term(b), lower[n]));
          upper[n] = flushed(__builtin_fmaf(upper_term(a), upper_term(b), upper[n]));
        }
      }
      for (int64_t n = 0; n < kTileSize; ++n) {
        float& sum = sums_[i][j][m][n];
        sum = flushed(flushed(sum) + flushed(lower[n] + upper[n]));
      }
    }
  }

 private:
  template <typename Row>
  static void load(const void* from, int64_t stride, int64_t rows, Row* to) {
    for (int64_t m = 0; m < rows; ++m) {
      std::memcpy(to[m], static_cast<const char*>(from) + m * stride, sizeof to[m]);
    }
  }

  static float flushed(float x) { return x < 0x1p-126F && x > -0x1p-126F ? x * 0.0F : x; }
  static float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  static float lower_term(uint32_t lane) { return flushed(as_float(lane << 16)); }
  static float upper_term(uint32_t lane) { return flushed(as_float(lane & 0xffff0000)); }

  int64_t rows_;
  float sums_[2][2][kTileSize][kTileSize];
  uint32_t left_[2][kTileSize][kTileSize];
  uint32_t right_[2][kTileSize][kTileSize];
};

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
