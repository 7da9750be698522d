// In place of csrc/cuda/gemm/tensor_core.h: the same operations on the host. A copy arrives when its
// group is waited for and not before, so that reading too early reads poison.
#pragma once

#include <array>
#include <deque>
#include <vector>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cuda/launch.h"

namespace torchmoe::emulation {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

/// The copies of one thread: groups that are ended, and the one that is not.
struct Copies {
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

inline Copies& copies() {
  static std::array<Copies, 1024> of_threads;
  return of_threads[place().thread.x];
}

struct MatrixRow {
  const void* row;
  unsigned matrices[4];
};

/// Hands out the lanes' parts; at(matrix, lane, half) is the address of a 16-bit number.
template <bool transposed>
void load_matrices_together(Lanes lanes) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    auto* mine = static_cast<MatrixRow*>(lanes[lane]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::uint16_t halves[2];
      for (int half = 0; half < 2; ++half) {
        const int along = lane % 4 * 2 + half;
        const int row = transposed ? along : lane / 4;
        const int column = transposed ? lane / 4 : along;
        const auto* source = static_cast<const MatrixRow*>(lanes[matrix * 8 + row]);
        check(reinterpret_cast<std::uintptr_t>(source->row) % 16 == 0,
              "ldmatrix of a row off 16 bytes");
        halves[half] = static_cast<const std::uint16_t*>(source->row)[column];
      }
      std::memcpy(&mine->matrices[matrix], halves, sizeof(unsigned));
    }
  }
}

template <typename T>
struct Fragments {
  float* sums;
  const unsigned* a;
  const unsigned* b;
};

template <typename T>
float element(unsigned pair, int half) {
  T values[2];
  std::memcpy(static_cast<void*>(values), &pair, sizeof(pair));
  return static_cast<float>(values[half]);
}

/// The 16 x 16 and 16 x 8 matrices are put together from the lanes' parts and multiplied plainly.
template <typename T>
void multiply_add_together(Lanes lanes) {
  float a[16][16];
  float b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto* part = static_cast<const Fragments<T>*>(lanes[lane]);
    const int g = lane / 4;
    const int t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = element<T>(part->a[i], half);
      }
      for (int i = 0; i < 2; ++i) {
        b[2 * t + half + i * 8][g] = element<T>(part->b[i], half);
      }
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto* part = static_cast<const Fragments<T>*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8;
      const int column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) {
        sum += a[row][k] * b[k][column];
      }
      part->sums[i] += sum;
    }
  }
}

}  // namespace torchmoe::emulation

namespace torchmoe::cuda {

inline void start_copy_16(void* shared, const void* global, int bytes) {
  emulation::check(reinterpret_cast<std::uintptr_t>(shared) % 16 == 0 &&
                       (bytes == 0 || reinterpret_cast<std::uintptr_t>(global) % 16 == 0),
                   "an asynchronous copy off 16 bytes");
  emulation::copies().open.push_back({shared, global, bytes});
}

inline void end_copy_group() {
  auto& copies = emulation::copies();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int newest>
void wait_for_copies() {
  auto& groups = emulation::copies().groups;
  for (; groups.size() > static_cast<std::size_t>(newest); groups.pop_front()) {
    for (const auto& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

inline void load_matrices(unsigned (&matrices)[4], const void* row) {
  const auto part = emulation::together(
      0xffffffffU, emulation::MatrixRow{row, {}}, &emulation::load_matrices_together<false>);
  std::memcpy(matrices, part.matrices, sizeof(matrices));
}

inline void load_matrices_transposed(unsigned (&matrices)[4], const void* row) {
  const auto part = emulation::together(
      0xffffffffU, emulation::MatrixRow{row, {}}, &emulation::load_matrices_together<true>);
  std::memcpy(matrices, part.matrices, sizeof(matrices));
}

template <typename T>
void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned* b) {
  emulation::together(
      0xffffffffU, emulation::Fragments<T>{sums, a, b}, &emulation::multiply_add_together<T>);
}

}  // namespace torchmoe::cuda
