// torchmoe._C: what is not a tensor op.
#include <map>
#include <string>

#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "backend.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#else
  return "GCC " __VERSION__;
#endif
}

/// The date of the OpenMP specification that at::parallel_for was compiled against.
std::string openmp() {
#ifdef _OPENMP
  return std::to_string(_OPENMP);
#else
  return "none";
#endif
}

/// How this library was built, for bug reports.
std::map<std::string, std::string> build_info() {
  return {
      {"torchmoe", TORCHMOE_VERSION},
      {"torch", TORCH_VERSION},
      {"compiler", compiler()},
      {"cuda", torchmoe::cuda_version()},
      {"openmp", openmp()},
      {"git_revision", TORCHMOE_GIT_REVISION},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict result;
    for (const auto& [name, value] : build_info()) {
      result[name.c_str()] = value;
    }
    return result;
  });
}
