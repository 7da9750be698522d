// Memory that a thread takes from task to task.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace torchmoe::cpu {

/// Uninitialised memory that grows with the largest request and starts at a cache line.
class Scratch {
 public:
  template <typename T>
  T* get(int64_t count) {
    constexpr size_t kLine = 64;
    const size_t bytes = (count * sizeof(T) + kLine - 1) / kLine * kLine;
    if (bytes > bytes_) {
      bytes_ = 0;
      memory_.reset(std::aligned_alloc(kLine, bytes));
      if (memory_ == nullptr) {
        throw std::bad_alloc();
      }
      bytes_ = bytes;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  std::unique_ptr<void, Free> memory_;
  size_t bytes_ = 0;
};

/// One for each thread of a parallel region.
struct Workspace {
  Scratch product;  // its operands as the kernels want them, and sums that wait for more terms
  Scratch sums;     // of a bias's gradient
  Scratch gate;     // blocks of results that an activation waits for
  Scratch up;
  Scratch group_rows;  // what the phases of the group that the thread has opened hand on: rows,
  Scratch group_dots;  // and a number or a few for each
};

}  // namespace torchmoe::cpu
