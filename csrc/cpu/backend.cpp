#include "backend.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace torchmoe {

namespace {

constexpr std::string_view kNamespace = "torchmoe::";

void refuse(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  const std::string_view name = op.operator_name().name;
  TORCH_CHECK(
      false,
      name.substr(kNamespace.size()),
      ": tensors must be on the CPU, got CUDA tensors: this torchmoe was built without CUDA; "
      "build it again where nvcc and a CUDA build of torch are found");
}

}  // namespace

void register_missing_backends(torch::Library& library) {
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.compare(0, kNamespace.size(), kNamespace) == 0) {
      library.impl(name.name.c_str(),
                   torch::dispatch(c10::DispatchKey::CUDA,
                                   torch::CppFunction::makeFromBoxedFunction<&refuse>()));
    }
  }
}

}  // namespace torchmoe
