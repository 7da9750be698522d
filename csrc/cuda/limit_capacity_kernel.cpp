#include "cuda/limit_capacity_kernel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "common/vocabulary.h"
#include "cuda/device.h"
#include "cuda/reroute.h"
#include "cuda/serving_order.h"
#include "ops/limit_capacity.h"

namespace torchmoe {

namespace {

constexpr auto kCapacityOp = "limit_capacity";

/// The order of service and its inverse, [N] each; none where the slots are served as they lie.
struct Service {
  std::optional<at::Tensor> serving;
  std::optional<at::Tensor> positions;
};

/// What says where a slot goes whose expert is full, contiguous and of the kernel's types.
struct Alternatives {
  at::Tensor scores;
  std::optional<at::Tensor> tie_break;
  std::optional<at::Tensor> backup;
};

/// The places of the slots by `order` alone as they are served, [N].
at::Tensor rank_slots(cuda::Stream stream,
                      const cuda::SlotSizes& sizes,
                      CapacityOrder order,
                      const at::Tensor& priority) {
  const auto priority_c = priority.contiguous();
  const bool is_double = priority.scalar_type() == at::kDouble;
  auto keys =
      at::empty({sizes.num_slots()}, priority.options().dtype(is_double ? at::kLong : at::kInt));
  with_float_type(priority.scalar_type(), [&]<typename scalar_t>() {
    cuda::rank_keys(stream,
                    sizes,
                    order,
                    priority_c.const_data_ptr<scalar_t>(),
                    keys.mutable_data_ptr<cuda::RankKey<scalar_t>>());
  });
  return std::get<1>(at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false));
}

Service order_of_service(cuda::Stream stream,
                         const cuda::SlotSizes& sizes,
                         CapacityOrder order,
                         const std::optional<at::Tensor>& priority,
                         const at::TensorOptions& options) {
  if (order == CapacityOrder::token && !priority) {
    return {};
  }
  const auto ranked =
      priority ? std::optional(rank_slots(stream, sizes, order, *priority)) : std::nullopt;
  auto serving = at::empty({sizes.num_slots()}, options);
  auto positions = at::empty({sizes.num_slots()}, options);
  cuda::order_slots(stream,
                    sizes,
                    order,
                    data_or_null<int64_t>(ranked),
                    serving.mutable_data_ptr<int64_t>(),
                    positions.mutable_data_ptr<int64_t>());
  return {serving, positions};
}

void drop(cuda::Stream stream,
          const at::Tensor& indices,
          const at::Tensor& capacity,
          const Service& service,
          at::Tensor& limited) {
  const cuda::SlotTiles tiles(indices.numel());
  auto counts = at::zeros({capacity.size(0) + 1, tiles.num_tiles}, indices.options());
  cuda::drop_overflow(stream,
                      {.tiles = tiles,
                       .num_experts = capacity.size(0),
                       .experts = indices.const_data_ptr<int64_t>(),
                       .serving = data_or_null<int64_t>(service.serving),
                       .counts = counts.mutable_data_ptr<int64_t>()},
                      capacity.const_data_ptr<int64_t>(),
                      limited.mutable_data_ptr<int64_t>());
}

void reroute(cuda::Stream stream,
             const cuda::SlotSizes& sizes,
             const at::Tensor& indices,
             const at::Tensor& capacity,
             const Alternatives& alternatives,
             const Service& service,
             at::Tensor& limited) {
  const int64_t num_experts = capacity.size(0);
  cuda::keep_routed(stream,
                    sizes.num_slots(),
                    num_experts,
                    indices.const_data_ptr<int64_t>(),
                    limited.mutable_data_ptr<int64_t>());
  auto room = at::empty({num_experts}, capacity.options());
  auto full_from = at::empty({num_experts}, capacity.options());
  auto marks = at::zeros({cuda::kRerouteWarps, num_experts}, capacity.options());
  auto takers = at::zeros({num_experts, cuda::kRerouteWarps}, capacity.options().dtype(at::kByte));
  with_float_type(alternatives.scores.scalar_type(), [&]<typename scalar_t>() {
    cuda::reroute_overflow<scalar_t>(
        stream,
        {.sizes = sizes,
         .num_experts = num_experts,
         .capacity = capacity.const_data_ptr<int64_t>(),
         .scores = alternatives.scores.const_data_ptr<scalar_t>(),
         .tie_break = data_or_null<at::opmath_type<scalar_t>>(alternatives.tie_break),
         .backup = data_or_null<int64_t>(alternatives.backup),
         .serving = data_or_null<int64_t>(service.serving),
         .positions = data_or_null<int64_t>(service.positions),
         .limited = limited.mutable_data_ptr<int64_t>(),
         .scratch = {.room = room.mutable_data_ptr<int64_t>(),
                     .full_from = full_from.mutable_data_ptr<int64_t>(),
                     .marks = marks.mutable_data_ptr<int64_t>(),
                     .takers = takers.mutable_data_ptr<uint8_t>()}});
  });
}

at::Tensor limit_capacity_kernel(const at::Tensor& indices,
                                 const at::Tensor& capacity,
                                 std::string_view order,
                                 const std::optional<at::Tensor>& priority,
                                 std::string_view overflow,
                                 const std::optional<at::Tensor>& scores,
                                 const std::optional<at::Tensor>& backup,
                                 const std::optional<at::Tensor>& tie_break) {
  check_limit_capacity(indices, capacity, order, priority, overflow, scores, backup, tie_break);
  const cuda::OnDevice device(indices);
  const cuda::SlotSizes sizes{indices.size(0), indices.size(1)};
  const auto indices_c = indices.contiguous();
  const auto capacity_c = capacity.contiguous();
  const auto service = order_of_service(device.stream(),
                                        sizes,
                                        choose<CapacityOrder>(kCapacityOp, order),
                                        priority,
                                        indices.options());
  auto limited = at::empty(indices.sizes(), indices.options());
  if (scores) {
    reroute(device.stream(),
            sizes,
            indices_c,
            capacity_c,
            {.scores = scores->contiguous(),
             .tie_break = contiguous_as(tie_break, accumulate_dtype(scores->scalar_type())),
             .backup = contiguous_as(backup, at::kLong)},
            service,
            limited);
  } else {
    drop(device.stream(), indices_c, capacity_c, service, limited);
  }
  return limited;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchmoe, CUDA, m) {
  m.impl("limit_capacity", &limit_capacity_kernel);
}

}  // namespace torchmoe
