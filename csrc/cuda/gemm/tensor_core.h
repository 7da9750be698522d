// What a warp can ask of the tensor cores and of the copy unit (sm_80 and later).
//
// Fragments are those of mma.m16n8k16 for 16-bit types, by lane = 4 g + t (PTX ISA, "Matrix
// Fragments for mma.m16n8k16"): a 16 x 16 [row g (+ 8), depth 2 t, 2 t + 1 (+ 8)], b 16 x 8 [depth
// 2 t, 2 t + 1 (+ 8), column g], sums 16 x 8 [row g (+ 8), columns 2 t, 2 t + 1].
#pragma once

#include <cstdint>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cuda/launch.h"

namespace torchmoe::cuda {

__device__ inline unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

/// Starts copying 16 bytes from `global` to `shared`; of those only the first `bytes` are read, the
/// others become 0.
__device__ inline void start_copy_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global),
               "r"(bytes));
}

/// Ends a group of this thread's copies.
__device__ inline void end_copy_group() {
  asm volatile("cp.async.commit_group;\n" ::);
}

/// Waits until at most the `newest` last groups of this thread's copies are under way.
template <int newest>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(newest) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements: lane 8 i + j gives the address of row j of matrix i and
/// gets row g, columns 2 t and 2 t + 1 of each.
__device__ inline void load_matrices(unsigned (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row)));
}

/// The same transposed: each lane gets rows 2 t and 2 t + 1 of column g.
__device__ inline void load_matrices_transposed(unsigned (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row)));
}

/// sums += a b, in float32.
template <typename T>
__device__ void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned* b);

template <>
__device__ inline void multiply_add<c10::BFloat16>(float (&sums)[4],
                                                   const unsigned (&a)[4],
                                                   const unsigned* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void multiply_add<c10::Half>(float (&sums)[4],
                                               const unsigned (&a)[4],
                                               const unsigned* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace torchmoe::cuda
