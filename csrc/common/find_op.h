// How the C++ entry points reach the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace torchmoe {

/// The handle of `name` ("torchmoe::permute"), whose schema matches Signature; looked up once by
/// each caller.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace torchmoe
