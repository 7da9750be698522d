#include "cpu/gemm/tasks.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "cpu/parallel.h"

namespace torchmoe::cpu {

namespace {

/// A phase whose tasks are being taken.
class OpenPhase {
 public:
  explicit OpenPhase(Phase tasks)
      : tasks_(std::move(tasks)), left_(static_cast<int64_t>(tasks_.size())) {}

  /// Runs a task that no thread has taken; false if there is none.
  bool run_one(Workspace& workspace) {
    const int64_t i = taken_.fetch_add(1);
    if (i >= static_cast<int64_t>(tasks_.size())) {
      return false;
    }
    tasks_[i](workspace);
    left_.fetch_sub(1);
    return true;
  }

  bool is_done() const { return left_.load() == 0; }

 private:
  Phase tasks_;
  std::atomic<int64_t> taken_{0};
  std::atomic<int64_t> left_;
};

/// A group, from before it is opened until it is done.
class Group {
 public:
  void open(std::vector<Phase> phases) {
    for (auto& phase : phases) {
      phases_.push_back(std::make_unique<OpenPhase>(std::move(phase)));
    }
    is_open_.store(true);
  }

  /// Runs a task of the first phase that is not done; false where it has none to give or the group is
  /// not open.
  bool run_one(Workspace& workspace) {
    if (!is_open_.load()) {
      return false;
    }
    for (const auto& phase : phases_) {
      if (!phase->is_done()) {
        return phase->run_one(workspace);
      }
    }
    return false;
  }

  bool is_done() const {
    return is_open_.load() &&
           std::all_of(phases_.begin(), phases_.end(), [](const auto& p) { return p->is_done(); });
  }

 private:
  std::vector<std::unique_ptr<OpenPhase>> phases_;
  std::atomic<bool> is_open_{false};
};

class Groups {
 public:
  explicit Groups(int64_t num_groups) : groups_(num_groups) {}

  /// What one thread does until everything is done, or until a task has thrown on some thread, for
  /// whose group the others would wait for ever.
  template <typename Open>
  void work(const Open& open) {
    try {
      Workspace workspace;
      const auto count = static_cast<int64_t>(groups_.size());
      for (int64_t g = opened_.fetch_add(1); g < count && !has_failed_.load();
           g = opened_.fetch_add(1)) {
        groups_[g].open(open(g, workspace));
        work_until([&] { return groups_[g].is_done(); },
                   [&] { return groups_[g].run_one(workspace); });
      }
      int64_t first = 0;  // that is not done
      work_until(
          [&] {
            while (first < count && groups_[first].is_done()) {
              ++first;
            }
            return first == count;
          },
          [&] {
            for (int64_t g = first; g < count; ++g) {
              if (groups_[g].run_one(workspace)) {
                return true;
              }
            }
            return false;
          });
    } catch (...) {
      has_failed_.store(true);
      throw;
    }
  }

 private:
  template <typename Done, typename Work>
  void work_until(const Done& done, const Work& work) {
    while (!done() && !has_failed_.load()) {
      if (!work()) {
        std::this_thread::yield();
      }
    }
  }

  std::vector<Group> groups_;
  std::atomic<int64_t> opened_{0};
  std::atomic<bool> has_failed_{false};
};

}  // namespace

void run_groups(int64_t num_groups,
                int64_t multiplications,
                const std::function<std::vector<Phase>(int64_t, Workspace&)>& open) {
  Groups groups(num_groups);
  parallel_workers(multiplications > kSharedMultiplications, [&] { groups.work(open); });
}

void run(Phase tasks, int64_t multiplications) {
  run_groups(1, multiplications, [&](int64_t, Workspace&) {
    std::vector<Phase> phases;
    phases.push_back(std::move(tasks));
    return phases;
  });
}

}  // namespace torchmoe::cpu
