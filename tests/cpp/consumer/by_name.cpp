// Names no symbol of libtorchmoe.so: the ops are there only if the library was linked all the same.
#include <cstdio>

#include <ATen/core/dispatch/Dispatcher.h>

int main() {
  const auto op = c10::Dispatcher::singleton().findSchema({"torchmoe::permute", ""});
  std::printf("%s\n", op ? toString(op->schema()).c_str() : "torchmoe::permute is not registered");
  return op ? 0 : 1;
}
