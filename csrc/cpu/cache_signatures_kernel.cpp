#include <cmath>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "cpu/gemm/product.h"
#include "cpu/gemm/tasks.h"
#include "cpu/similar_keys.h"
#include "ops/cache_signatures.h"

namespace torchmoe {

namespace {

// Rows per task.
constexpr int64_t kBlockRows = 256;

struct Sizes {
  int64_t rows;
  int64_t width;
  int64_t tables;
  int64_t bits;
};

/// Whether squares of its length, and products of those, are numbers above 0.
template <typename T>
bool has_direction(const T* row, int64_t width) {
  constexpr double kLeast = 1e-150;
  constexpr double kMost = 1e150;
  const double squared = cpu::compare_rows(row, row, width).a_squared;
  return squared >= kLeast && squared <= kMost;
}

template <typename T>
void signatures_of_rows(const T* x,
                        const T* planes,
                        const bool* mask,
                        const Sizes& sizes,
                        int64_t begin,
                        int64_t count,
                        int64_t* signatures,
                        cpu::Workspace& workspace) {
  const int64_t columns = sizes.tables * sizes.bits;
  T* products = workspace.gate.get<T>(count * columns);
  cpu::product(cpu::Form::nt,
               cpu::Rows<T>{x, sizes.width}.from(begin, 0),
               cpu::Rows<T>{planes, sizes.width},
               {count, columns, sizes.width},
               /*bias=*/nullptr,
               products,
               columns,
               workspace);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = begin + i;
    int64_t* out = signatures + row * sizes.tables;
    if ((mask != nullptr && !mask[row]) || !has_direction(x + row * sizes.width, sizes.width)) {
      std::fill_n(out, sizes.tables, -1);
      continue;
    }
    const T* side = products + i * columns;
    for (int64_t table = 0; table < sizes.tables; ++table) {
      int64_t signature = 0;
      for (int64_t bit = 0; bit < sizes.bits; ++bit) {
        signature |= static_cast<int64_t>(*side++ >= 0) << bit;
      }
      out[table] = signature;
    }
  }
}

at::Tensor cache_signatures_kernel(const at::Tensor& x,
                                   const at::Tensor& planes,
                                   const std::optional<at::Tensor>& row_mask) {
  check_cache_signatures(x, planes, row_mask);
  const auto acc = accumulate_dtype(x.scalar_type());
  const auto x_acc = contiguous_as(x, acc);
  const auto planes_acc = contiguous_as(planes, acc);
  const auto mask = contiguous(row_mask);
  const Sizes sizes{x.size(0), x.size(1), planes.size(0), planes.size(1)};
  auto signatures = at::empty({sizes.rows, sizes.tables}, x.options().dtype(at::kLong));
  with_accumulate_type(acc, [&]<typename scalar_t>() {
    const auto* x_data = x_acc.const_data_ptr<scalar_t>();
    const auto* plane_data = planes_acc.const_data_ptr<scalar_t>();
    const auto* mask_data = data_or_null<bool>(mask);
    auto* out = signatures.mutable_data_ptr<int64_t>();
    cpu::Phase tasks;
    for (int64_t begin = 0; begin < sizes.rows; begin += kBlockRows) {
      tasks.push_back([=, &sizes](cpu::Workspace& workspace) {
        const int64_t count = std::min(kBlockRows, sizes.rows - begin);
        signatures_of_rows(x_data, plane_data, mask_data, sizes, begin, count, out, workspace);
      });
    }
    cpu::run(std::move(tasks), sizes.rows * sizes.tables * sizes.bits * sizes.width);
  });
  return signatures;
}

}  // namespace

// Whatever the device: where it is not the CPU, the check says so.
TORCH_LIBRARY_IMPL(torchmoe, CompositeExplicitAutograd, m) {
  m.impl("cache_signatures", &cache_signatures_kernel);
}

}  // namespace torchmoe
