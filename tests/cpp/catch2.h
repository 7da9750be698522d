// Catch2 for tests that use torch.
#pragma once

#include <torch/torch.h>

// c10's logging defines the macro of that name too; the tests mean Catch2's.
#undef CHECK

#include "simd/catch2.h"
