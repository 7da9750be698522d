// Parallel loops whose results do not depend on the number of threads.
//
// Two rules: work is cut into tasks by sizes alone, never by the thread count, and every sum
// belongs to one task or is formed over the tasks in their order. Which thread takes which task is
// then free, and the next idle one does.
//
// Work that is too small to share is done without a parallel region: opening one takes some
// microseconds, and a process forked from one that has used threads has none, and would wait for
// them for ever. torch's own operators keep to the same.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <ATen/Parallel.h>

namespace torchmoe::cpu {

/// How many elements of cheap element-wise work are worth a thread: torch's own grain.
constexpr int64_t kNumbersPerThread = 32768;

/// Multiplications of matrix products that are worth sharing: some microseconds on one thread.
constexpr int64_t kSharedMultiplications = 131072;

/// Runs worker() on every thread, or on this one alone where the work is too small to share.
template <typename Worker>
void parallel_workers(bool is_shared, const Worker& worker) {
  if (!is_shared) {
    worker();
    return;
  }
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      worker();
    }
  });
}

/// Runs task(i) for i in [0, num_tasks), each of which touches about `numbers_per_task` elements.
template <typename Task>
void parallel_tasks(int64_t num_tasks, int64_t numbers_per_task, const Task& task) {
  std::atomic<int64_t> taken{0};
  parallel_workers(num_tasks > 1 && num_tasks * numbers_per_task > kNumbersPerThread, [&] {
    for (int64_t i = taken.fetch_add(1); i < num_tasks; i = taken.fetch_add(1)) {
      task(i);
    }
  });
}

/// Runs body(begin, end) over pieces of [0, size): for loops whose items share no sum. A piece is
/// worth starting a thread for when it touches kNumbersPerThread elements.
template <typename Body>
void parallel_items(int64_t size, int64_t numbers_per_item, const Body& body) {
  const int64_t grain =
      std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, numbers_per_item));
  at::parallel_for(0, size, grain, body);
}

}  // namespace torchmoe::cpu
