// The types of the elements of tensors: the table from which the dispatch over a tensor's type,
// the check of it and the instances of kernels follow.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

/// X(type, ScalarType, name in Python), in the order in which messages list them.
#define TORCHMOE_FLOAT_TYPES(X) \
  TORCHMOE_ACCUMULATE_TYPES(X)  \
  TORCHMOE_NARROW_TYPES(X)

/// The types that sums are formed in.
#define TORCHMOE_ACCUMULATE_TYPES(X) \
  X(float, Float, "float32")         \
  X(double, Double, "float64")

/// The types whose sums are formed in another one.
#define TORCHMOE_NARROW_TYPES(X)         \
  X(c10::BFloat16, BFloat16, "bfloat16") \
  X(c10::Half, Half, "float16")
