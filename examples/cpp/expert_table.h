// Each expert's share of the bytes, as a table.
#pragma once

#include <ATen/core/Tensor.h>

/// Prints a row for each expert and a column for each layer. counts int64 [L, E].
void print_expert_table(const at::Tensor& counts);
