// The tile registers of AMX: one instruction multiplies two tiles of 16 x 16 pairs of bfloat16.
//
// The instructions are written out, since a compiler's functions for them take a tile's number as a
// literal only, and gcc's do not say that a load reads memory.
#pragma once

#include <cstdint>

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

/// Rows of a tile, and lanes of 32 bits of each row.
constexpr int64_t kTileSize = 16;

/// The registers of this thread: 2 x 2 tiles of sums, float32, and two of either operand.
class Tiles {
 public:
  /// The sums and the left operand have so many rows, at most kTileSize.
  explicit Tiles(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    static_assert(sizeof shape == 64);
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 64;
      shape.rows[i] = i < kRight<0> ? static_cast<uint8_t>(rows) : 16;
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  /// Rows are `stride` bytes apart.
  template <int i>
  void load_left(const void* from, int64_t stride) {
    load<kLeft<i>>(from, stride);
  }
  template <int j>
  void load_right(const void* from, int64_t stride) {
    load<kRight<j>>(from, stride);
  }
  template <int i, int j>
  void load_sums(const void* from, int64_t stride) {
    load<kSums<i, j>>(from, stride);
  }
  template <int i, int j>
  void store_sums(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)"
                 :
                 : "i"(kSums<i, j>), "r"(to), "r"(stride)
                 : "memory");
  }
  template <int i, int j>
  void clear_sums() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kSums<i, j>));
  }

  /// Adds the product of left tile i and right tile j to sums i, j. Of each of them the products of
  /// the lower terms are added to each other in order, likewise those of the upper terms, then the
  /// two sums, and the result to what is there. Subnormal numbers count as 0.
  template <int i, int j>
  void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                 :
                 : "i"(kSums<i, j>), "i"(kLeft<i>), "i"(kRight<j>));
  }

 private:
  template <int i, int j>
  static constexpr int kSums = 2 * i + j;
  template <int i>
  static constexpr int kLeft = 4 + i;
  template <int j>
  static constexpr int kRight = 6 + j;

  template <int tile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(stride) : "memory");
  }
};

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
