// The checks that the modules' constructors share. A message reads `Class: argument must ..., got
// ...`.
#pragma once

#include <cmath>
#include <cstdint>

#include <c10/util/Exception.h>

namespace torchmoe::nn {

inline void check_at_least(const char* owner, const char* argument, int64_t value, int64_t least) {
  TORCH_CHECK_VALUE(value >= least, owner, ": ", argument, " must be >= ", least, ", got ", value);
}

inline void check_not_negative(const char* owner, const char* argument, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0,
                    owner,
                    ": ",
                    argument,
                    " must be a finite number >= 0, got ",
                    value);
}

}  // namespace torchmoe::nn
