// Products of rows with an expert's matrix, in either orientation.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/matrices.h"
#include "cpu/gemm/product.h"

namespace torchmoe::cpu {

/// out = rows matrix^T + bias: of one expert's matrix sizes.n rows.
template <typename L, typename W, typename Out>
void times_transposed(const Rows<L>& rows,
                      const Matrices<const W>& matrix,
                      const ProductSizes& sizes,
                      const std::type_identity_t<W>* bias,
                      Out* out,
                      int64_t out_stride,
                      Workspace& workspace) {
  product(matrix.transposed ? Form::nn : Form::nt,
          rows,
          Rows<W>{matrix.data, matrix.stride},
          sizes,
          bias,
          out,
          out_stride,
          workspace);
}

/// out = rows matrix: of one expert's matrix sizes.n columns.
template <typename L, typename W, typename Out>
void times(const Rows<L>& rows,
           const Matrices<const W>& matrix,
           const ProductSizes& sizes,
           Out* out,
           int64_t out_stride,
           Workspace& workspace) {
  const W* no_bias = nullptr;
  product(matrix.transposed ? Form::nt : Form::nn,
          rows,
          Rows<W>{matrix.data, matrix.stride},
          sizes,
          no_bias,
          out,
          out_stride,
          workspace);
}

}  // namespace torchmoe::cpu
