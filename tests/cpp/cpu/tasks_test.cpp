#include "cpu/gemm/tasks.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <future>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <ATen/Parallel.h>

#include "support.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own words
using torchmoe::cpu::Phase;
using torchmoe::cpu::run;
using torchmoe::cpu::run_groups;
using torchmoe::cpu::Workspace;

namespace {

/// Multiplications enough for every thread.
constexpr int64_t kShared = std::numeric_limits<int64_t>::max();

/// Runs body with 1, 2 and 4 threads, on a thread of its own, whose number of threads nobody else
/// sees. What hangs ends the tests instead of stopping them.
void for_threads(const std::function<void()>& body) {
  for (const int threads : {1, 2, 4}) {
    INFO(threads << " threads");
    auto done = std::async(std::launch::async, [&] {
      at::set_num_threads(threads);
      body();
    });
    if (done.wait_for(std::chrono::seconds(60)) != std::future_status::ready) {
      std::cerr << "tasks_test: hangs with " << threads << " threads\n";
      std::_Exit(EXIT_FAILURE);
    }
    done.get();
  }
}

using Counts = std::vector<std::atomic<int>>;

/// Which of the counts are not `expected`.
std::vector<size_t> others(const Counts& counts, int expected) {
  std::vector<size_t> result;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] != expected) {
      result.push_back(i);
    }
  }
  return result;
}

/// Long enough for another thread to take a task.
void wait_a_little() {
  std::this_thread::sleep_for(std::chrono::microseconds(50));
}

}  // namespace

TEST_CASE("run: every task once", "[cpu][tasks]") {
  for_threads([] {
    for (const size_t count : {0, 1, 2, 3, 100, 5000, 5001}) {
      Counts runs(count);
      Phase tasks;
      for (size_t i = 0; i < count; ++i) {
        tasks.push_back([&, i](Workspace& workspace) {
          workspace.gate.get<double>(static_cast<int64_t>(1 + i % 7))[0] = 0;
          ++runs[i];
        });
      }
      run(tasks, count % 2 == 0 ? kShared : 0);
      CHECK(others(runs, 1).empty());
    }
  });
}

TEST_CASE("run_groups: phases follow one another", "[cpu][tasks]") {
  for_threads([] {
    // By group the tasks of each phase: groups and phases with nothing in them among the others.
    const std::vector<std::vector<int>> sizes = {{5, 3, 7},
                                                 {},
                                                 {0},
                                                 {1, 0, 1},
                                                 {0, 4},
                                                 {4, 0},
                                                 {0, 0, 0},
                                                 {30, 30, 30},
                                                 {2},
                                                 {1, 1, 1, 1, 1}};
    for (int repeat = 0; repeat < 5; ++repeat) {
      Counts opened(sizes.size()), runs(sizes.size());
      std::atomic<int> too_early{0}, too_late{0};
      std::vector<Counts> left;  // tasks of a phase that are not done
      int total = 0;
      for (const auto& phases : sizes) {
        left.emplace_back(phases.size());
        for (size_t p = 0; p < phases.size(); ++p) {
          left.back()[p] = phases[p];
          total += phases[p];
        }
      }
      std::atomic<int> ran{0};
      run_groups(static_cast<int64_t>(sizes.size()), kShared, [&](int64_t g, Workspace&) {
        ++opened[g];
        std::vector<Phase> phases(sizes[g].size());
        for (size_t p = 0; p < phases.size(); ++p) {
          for (int t = 0; t < sizes[g][p]; ++t) {
            phases[p].push_back([&, g, p](Workspace&) {
              for (size_t before = 0; before < p; ++before) {
                too_early += left[g][before] != 0 ? 1 : 0;
              }
              wait_a_little();
              --left[g][p];
              ++ran;
            });
          }
        }
        return phases;
      });
      CHECK(others(opened, 1).empty());
      CHECK(too_early == 0);
      CHECK(ran == total);
    }
  });
}

TEST_CASE("run_groups: none", "[cpu][tasks]") {
  for_threads([] {
    run_groups(0, kShared, [](int64_t, Workspace&) -> std::vector<Phase> {
      throw std::logic_error("there is no group");
    });
  });
}

TEST_CASE("run_groups: a group's memory is its own until it is done", "[cpu][tasks]") {
  for_threads([] {
    constexpr int64_t kGroups = 20, kNumbers = 1000;
    std::atomic<int> wrong{0};
    run_groups(kGroups, kShared, [&](int64_t g, Workspace& workspace) {
      auto* numbers = workspace.group_rows.get<int64_t>(kNumbers);
      std::fill_n(numbers, kNumbers, -1);
      std::vector<Phase> phases(2);
      for (int64_t t = 0; t < 10; ++t) {
        phases[0].push_back([=](Workspace& helper) {
          // A task's own scratch is never the group's.
          std::fill_n(helper.gate.get<int64_t>(kNumbers), kNumbers, -7);
          wait_a_little();
          std::fill_n(numbers + t * kNumbers / 10, kNumbers / 10, g);
        });
        phases[1].push_back([=, &wrong](Workspace&) {
          for (int64_t i = 0; i < kNumbers; ++i) {
            wrong += numbers[i] != g ? 1 : 0;
          }
        });
      }
      return phases;
    });
    CHECK(wrong == 0);
  });
}

TEST_CASE("run: two tasks at once have two workspaces", "[cpu][tasks]") {
  for_threads([] {
    std::atomic<int> wrong{0};
    Phase tasks;
    for (int64_t i = 0; i < 200; ++i) {
      tasks.push_back([&wrong, i](Workspace& workspace) {
        auto* number = workspace.product.get<int64_t>(1);
        *number = i;
        wait_a_little();
        wrong += *number != i ? 1 : 0;
      });
    }
    run(tasks, kShared);
    CHECK(wrong == 0);
  });
}

TEST_CASE("run_groups: threads without a group help", "[cpu][tasks]") {
  if (std::thread::hardware_concurrency() < 2) {
    return;
  }
  for_threads([] {
    if (at::get_num_threads() == 1) {
      return;
    }
    // Each of two tasks waits until the other has begun; on one thread it gives up.
    std::atomic<int> begun{0}, met{0};
    const auto task = [&](Workspace&) {
      ++begun;
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      while (begun < 2 && std::chrono::steady_clock::now() < end) {
        std::this_thread::yield();
      }
      met += begun == 2 ? 1 : 0;
    };
    run_groups(1, kShared, [&](int64_t, Workspace&) { return std::vector<Phase>{{task, task}}; });
    CHECK(met == 2);
  });
}

TEST_CASE("run: what a task throws", "[cpu][tasks]") {
  for_threads([] {
    for (const int thrower : {0, 1, 57, 99}) {
      INFO("task " << thrower);
      Counts runs(100);
      std::atomic<int> running{0};
      Phase tasks;
      for (int i = 0; i < 100; ++i) {
        tasks.push_back([&, i](Workspace&) {
          ++running;
          ++runs[i];
          wait_a_little();
          --running;
          if (i == thrower) {
            throw std::runtime_error("task " + std::to_string(i));
          }
        });
      }
      CHECK_THROWS_WITH(run(tasks, kShared), contains("task " + std::to_string(thrower)));
      CHECK(running == 0);  // nobody goes on after run has returned
      for (const auto& count : runs) {
        CHECK(count <= 1);
      }
      CHECK(runs[thrower] == 1);
      // Nothing is left behind.
      std::atomic<int> after{0};
      run({[&](Workspace&) { ++after; }, [&](Workspace&) { ++after; }}, kShared);
      CHECK(after == 2);
    }
  });
}

TEST_CASE("run: every task throws", "[cpu][tasks]") {
  for_threads([] {
    const Phase tasks(50, [](Workspace&) { throw std::runtime_error("some task"); });
    CHECK_THROWS_WITH(run(tasks, kShared), contains("some task"));
  });
}

TEST_CASE("run_groups: what a group throws when it is opened or in its first phase",
          "[cpu][tasks]") {
  for_threads([] {
    for (const int64_t thrower : {0, 3, 7}) {
      for (const bool in_open : {true, false}) {
        INFO("group " << thrower << (in_open ? " when opened" : " in a task"));
        std::atomic<int> too_early{0};
        CHECK_THROWS_WITH(
            run_groups(8,
                       kShared,
                       [&](int64_t g, Workspace&) {
                         if (g == thrower && in_open) {
                           throw std::runtime_error("a group");
                         }
                         std::vector<Phase> phases(2);
                         for (int t = 0; t < 5; ++t) {
                           phases[0].push_back([=](Workspace&) {
                             wait_a_little();
                             if (g == thrower && t == 2) {
                               throw std::runtime_error("a group");
                             }
                           });
                         }
                         phases[1].push_back([&, g](Workspace&) { too_early += g == thrower; });
                         return phases;
                       }),
            contains("a group"));
        CHECK(too_early == 0);  // its first phase is never done
      }
    }
  });
}

TEST_CASE("run: within a task", "[cpu][tasks]") {
  for_threads([] {
    constexpr size_t kOuter = 10, kInner = 20;
    Counts runs(kOuter * kInner);
    std::atomic<int> caught{0};
    Phase tasks;
    for (size_t i = 0; i < kOuter; ++i) {
      tasks.push_back([&, i](Workspace& workspace) {
        auto* number = workspace.product.get<size_t>(1);
        *number = i;
        Phase inner;
        for (size_t j = 0; j < kInner; ++j) {
          inner.push_back([&, i, j](Workspace& other) {
            *other.product.get<size_t>(1) = 1000;
            ++runs[i * kInner + j];
          });
        }
        run(inner, kShared);
        if (*number != i) {
          throw std::logic_error("the inner tasks wrote to the outer one's workspace");
        }
        try {
          run({[](Workspace&) { throw std::runtime_error("inner"); }}, kShared);
        } catch (const std::runtime_error&) {
          ++caught;
        }
      });
    }
    run(tasks, kShared);
    CHECK(others(runs, 1).empty());
    CHECK(caught == kOuter);
  });
}
