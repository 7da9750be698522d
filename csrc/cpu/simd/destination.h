// Where the sums of a product go.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd/simd.h"
#include "cpu/simd/sizes.h"
#include "cpu/simd/vector.h"

namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET {

/// The sums of a block of the result after a slice of their terms.
template <typename Sum, typename Bias, typename Out>
struct Destination {
  Sum* sums;  // between slices
  int64_t sums_stride;
  bool has_earlier;  // sums holds those of earlier slices
  bool is_last;      // after this slice they are the result:
  Out* out;
  int64_t out_stride;
  const Bias* bias;  // [columns]; null: none

  Destination from(int64_t row, int64_t column) const {
    Destination rest = *this;
    rest.sums += row * sums_stride + column;
    rest.out += row * out_stride + column;
    rest.bias = bias == nullptr ? nullptr : bias + column;
    return rest;
  }

  /// Whether a tile's sums need no more than to be stored.
  bool takes_sums() const { return !is_last || (std::is_same_v<Sum, Out> && bias == nullptr); }

  /// Takes sums [rows, columns], whose rows hold whole vectors, out of a buffer.
  void take(const Sum* buffer, int64_t stride, int64_t rows, int64_t columns) const {
    for (int64_t i = 0; i < rows; ++i, buffer += stride) {
      if (!is_last) {
        std::memcpy(sums + i * sums_stride, buffer, columns * sizeof(Sum));
        continue;
      }
      for (int64_t c = 0; c < columns; c += kWidthOf<Sum>) {
        auto v = load(buffer + c);
        if (bias != nullptr) {
          v += load_up_to(bias + c, columns - c);
        }
        store_up_to(v, out + i * out_stride + c, columns - c);
      }
    }
  }
};

/// That of the columns of a call's result; `waiting` is for the sums that wait outside of it.
template <typename Sum, typename Bias, typename Out>
Destination<Sum, Bias, Out> destination_of(const ProductCall& call, Range columns, Sum* waiting) {
  Destination<Sum, Bias, Out> destination{};
  destination.out = static_cast<Out*>(call.out.data) + columns.begin;
  destination.out_stride = call.out_stride;
  const auto* bias = static_cast<const Bias*>(call.bias.data);
  destination.bias = bias == nullptr ? nullptr : bias + columns.begin;
  if constexpr (std::is_same_v<Sum, Out>) {
    destination.sums = destination.out;
    destination.sums_stride = call.out_stride;
  } else {
    destination.sums = waiting;
    destination.sums_stride = columns.size;
  }
  return destination;
}

/// Calls body(columns, terms, destination) for each slice of a product: of so many columns, and of
/// these the terms from the first to the last; once where there is no term. `waiting` is for the sums
/// that wait for further terms outside of the result.
template <typename Sum, typename Bias, typename Out, typename Body>
void for_slices(const ProductCall& call,
                int64_t most_columns,
                int64_t most_terms,
                Sum* waiting,
                const Body& body) {
  for (int64_t j = 0; j < call.n; j += most_columns) {
    const Range columns{j, min(most_columns, call.n - j)};
    auto destination = destination_of<Sum, Bias, Out>(call, columns, waiting);
    int64_t k = 0;
    do {
      const Range terms{k, min(most_terms, call.k - k)};
      destination.has_earlier = k > 0;
      k += terms.size;
      destination.is_last = k == call.k;
      body(columns, terms, destination);
    } while (k < call.k);
  }
}

}  // namespace torchmoe::cpu::TORCHMOE_INSTRUCTION_SET
