#define CATCH_CONFIG_RUNNER
#include <ATen/Parallel.h>

#include "catch2.h"

int main(int argc, char* argv[]) {
  torch::manual_seed(0);
  // The tensors are so small that threads only wait for each other. determinism_test.cpp shows that
  // more threads change nothing.
  at::set_num_threads(1);
  return Catch::Session().run(argc, argv);
}
