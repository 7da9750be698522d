// The experts' matrices as kernels reach them.
#pragma once

#include <cstdint>

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

/// Those of all experts, one after the other, or of one of them.
template <typename T>
struct ExpertMatrices {
  T* w_in;
  T* b_in;  // null: none
  T* w_out;
  T* b_out;
};

/// Copies of those that are not contiguous.
inline ExpertParameters contiguous(const ExpertParameters& experts) {
  return {experts.w_in.contiguous(),
          torchmoe::contiguous(experts.b_in),
          experts.w_out.contiguous(),
          torchmoe::contiguous(experts.b_out)};
}

/// The numbers of contiguous parameters.
template <typename T>
ExpertMatrices<const T> matrices_of(const ExpertParameters& experts) {
  return {experts.w_in.const_data_ptr<T>(),
          data_or_null<T>(experts.b_in),
          experts.w_out.const_data_ptr<T>(),
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
  return {advance(all.w_in, e * shape.pre_width * shape.hidden),
          advance(all.b_in, e * shape.pre_width),
          advance(all.w_out, e * shape.hidden * shape.intermediate),
          advance(all.b_out, e * shape.hidden)};
}

}  // namespace torchmoe::cpu
