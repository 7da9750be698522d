// The experts' matrices as kernels reach them.
#pragma once

#include <cstdint>

#include "common/matrices.h"
#include "common/orientation.h"
#include "common/tensors.h"
#include "ops/expert_parameters.h"

namespace torchmoe::cpu {

/// The sizes of one expert: w_in [P, H], b_in [P], w_out [H, I], b_out [H].
struct ExpertShape {
  int64_t hidden;
  int64_t intermediate;
  int64_t pre_width;

  /// Of both products, for one row.
  int64_t multiplications() const { return hidden * (pre_width + intermediate); }
};

inline ExpertShape shape_of(const ExpertParameters& experts) {
  return {experts.w_out.size(1), experts.w_out.size(2), experts.w_in.size(1)};
}

/// Those of all experts, or of one of them.
template <typename T>
struct ExpertMatrices {
  Matrices<T> w_in;
  T* b_in = nullptr;  // null: none
  Matrices<T> w_out;
  T* b_out = nullptr;
};

/// As kernels read them, copied where they must be.
inline ExpertParameters readable(const ExpertParameters& experts) {
  return {oriented(experts.w_in),
          torchmoe::contiguous(experts.b_in),
          oriented(experts.w_out),
          torchmoe::contiguous(experts.b_out)};
}

/// The numbers of readable parameters.
template <typename T>
ExpertMatrices<const T> matrices_of(const ExpertParameters& experts) {
  return {torchmoe::matrices_of<const T>(experts.w_in),
          data_or_null<T>(experts.b_in),
          torchmoe::matrices_of<const T>(experts.w_out),
          data_or_null<T>(experts.b_out)};
}

/// `offset` elements further on, null where there is nothing.
template <typename T>
T* advance(T* data, int64_t offset) {
  return data == nullptr ? nullptr : data + offset;
}

/// Expert e's matrices.
template <typename T>
ExpertMatrices<T> of_expert(const ExpertMatrices<T>& all, int64_t e, const ExpertShape& shape) {
  return {all.w_in.of(e),
          advance(all.b_in, e * shape.pre_width),
          all.w_out.of(e),
          advance(all.b_out, e * shape.hidden)};
}

}  // namespace torchmoe::cpu
