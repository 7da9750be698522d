#include "emulator.h"

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <vector>

#include <sys/mman.h>

namespace torchmoe::emulation {

namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
constexpr int kMaxThreads = 1024;
// NaN in every floating type, and an index far outside of everything.
constexpr unsigned char kPoison = 0xff;

enum class Waits { nothing, at_barrier, for_lanes, done };

/// A thread of a block, on a stack of its own that is kept for the next block.
struct Fiber {
  ucontext_t context{};
  jmp_buf resume{};
  void* stack = nullptr;
  bool started = false;
  Waits waits = Waits::nothing;
  Place place;
};

struct Warp {
  Collective compute = nullptr;
  unsigned mask = 0;
  unsigned arrived = 0;
  void* operands[kWarpSize] = {};
};

class Grid {
 public:
  ~Grid() {
    for (auto& fiber : fibers_) {
      munmap(fiber->stack, kStackBytes);
    }
  }

  void run_block(unsigned block,
                 unsigned blocks,
                 int threads,
                 bool descending,
                 const std::function<void()>& body);
  void wait(Waits reason);
  void arrive_at_barrier();
  void arrive_in_warp(unsigned mask, Collective compute, void* operand);
  [[noreturn]] void fail(const std::string& message);

  const Place& place() const { return running_->place; }
  std::vector<unsigned char>& shared() { return shared_; }

 private:
  static void enter();
  /// Runs a warp for as long as any of its lanes can go on: as far ahead of the other warps as
  /// barriers let it, which is where a missing one shows.
  bool run_warp(int warp, bool descending);
  void resume(Fiber& fiber);
  Fiber& fiber(int i);

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned char> shared_;
  const std::function<void()>* body_ = nullptr;
  Fiber* running_ = nullptr;
  jmp_buf scheduler_{};
  ucontext_t scheduler_context_{};
  int threads_ = 0;
  int alive_ = 0;
  int at_barrier_ = 0;
  std::string error_;
};

std::mutex mutex;
std::unique_ptr<Grid> grid;
bool descending = false;

Fiber& Grid::fiber(int i) {
  while (static_cast<int>(fibers_.size()) <= i) {
    auto next = std::make_unique<Fiber>();
    next->stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fibers_.push_back(std::move(next));
  }
  return *fibers_[i];
}

/// A fiber's life: one thread of a block after another.
void Grid::enter() {
  for (;;) {
    (*grid->body_)();
    --grid->alive_;
    grid->wait(Waits::done);
  }
}

void Grid::resume(Fiber& fiber) {
  running_ = &fiber;
  if (_setjmp(scheduler_) != 0) {
    return;
  }
  if (fiber.started) {
    _longjmp(fiber.resume, 1);
  }
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &Grid::enter, 0);
  swapcontext(&scheduler_context_, &fiber.context);
}

void Grid::wait(Waits reason) {
  running_->waits = reason;
  if (_setjmp(running_->resume) == 0) {
    _longjmp(scheduler_, 1);
  }
}

void Grid::fail(const std::string& message) {
  error_ = message;
  _longjmp(scheduler_, 1);
}

void Grid::arrive_at_barrier() {
  ++at_barrier_;
  wait(Waits::at_barrier);
}

void Grid::arrive_in_warp(unsigned mask, Collective compute, void* operand) {
  const unsigned thread = running_->place.thread.x;
  const unsigned lane = thread % kWarpSize;
  Warp& warp = warps_[thread / kWarpSize];
  if ((mask & (1U << lane)) == 0) {
    fail("a lane takes part in a warp operation whose mask leaves it out");
  }
  if (warp.arrived == 0) {
    warp.compute = compute;
    warp.mask = mask;
  } else if (warp.compute != compute || warp.mask != mask) {
    fail("the lanes of a warp are at different operations");
  }
  warp.arrived |= 1U << lane;
  warp.operands[lane] = operand;
  if (warp.arrived != mask) {
    wait(Waits::for_lanes);
    return;
  }
  compute(warp.operands);
  const unsigned first = thread / kWarpSize * kWarpSize;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if ((mask & (1U << i)) != 0) {
      fibers_[first + i]->waits = Waits::nothing;
      warp.operands[i] = nullptr;
    }
  }
  warp.arrived = 0;
}

bool Grid::run_warp(int warp, bool descending) {
  const int first = warp * kWarpSize;
  const int lanes = std::min(kWarpSize, threads_ - first);
  bool moved = false;
  for (bool moving = true; moving;) {
    moving = false;
    for (int lane = 0; lane < lanes; ++lane) {
      Fiber& f = *fibers_[first + (descending ? lanes - 1 - lane : lane)];
      if (f.waits == Waits::nothing) {
        moving = true;
        resume(f);
        if (!error_.empty()) {
          throw std::runtime_error("emulation: " + error_);
        }
      }
    }
    moved = moved || moving;
  }
  return moved;
}

void Grid::run_block(unsigned block,
                     unsigned blocks,
                     int threads,
                     bool descending,
                     const std::function<void()>& body) {
  threads_ = threads;
  alive_ = threads;
  at_barrier_ = 0;
  body_ = &body;
  const int num_warps = (threads + kWarpSize - 1) / kWarpSize;
  warps_.assign(num_warps, Warp{});
  std::memset(shared_.data(), kPoison, shared_.size());
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fiber(i);
    f.waits = Waits::nothing;
    f.place = {{static_cast<unsigned>(i)}, {block}, {static_cast<unsigned>(threads)}, {blocks}};
  }
  while (alive_ > 0) {
    bool moved = false;
    for (int w = 0; w < num_warps; ++w) {
      moved = run_warp(descending ? num_warps - 1 - w : w, descending) || moved;
    }
    if (alive_ > 0 && at_barrier_ == alive_) {
      if (at_barrier_ != threads) {
        throw std::runtime_error("emulation: a thread ended before a barrier that others wait at");
      }
      at_barrier_ = 0;
      for (int i = 0; i < threads; ++i) {
        fibers_[i]->waits = Waits::nothing;
      }
    } else if (!moved) {
      throw std::runtime_error("emulation: threads wait for each other in vain");
    }
  }
}

}  // namespace

const Place& place() {
  return grid->place();
}

unsigned char* shared_memory() {
  return grid->shared().data();
}

void barrier() {
  grid->arrive_at_barrier();
}

void collective(unsigned mask, Collective compute, void* operand) {
  grid->arrive_in_warp(mask, compute, operand);
}

void check(bool condition, const char* message) {
  if (!condition) {
    grid->fail(message);
  }
}

void run_grid(int64_t blocks,
              int threads,
              std::size_t shared_bytes,
              const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (threads < 1 || threads > kMaxThreads) {
    throw std::runtime_error("emulation: a block of " + std::to_string(threads) + " threads");
  }
  if (grid == nullptr) {
    grid = std::make_unique<Grid>();
  }
  grid->shared().assign(shared_bytes, kPoison);
  descending = !descending;
  try {
    for (int64_t block = 0; block < blocks; ++block) {
      grid->run_block(
          static_cast<unsigned>(block), static_cast<unsigned>(blocks), threads, descending, body);
    }
  } catch (...) {
    grid.reset();  // its fibers stand in the middle of a kernel
    throw;
  }
}

}  // namespace torchmoe::emulation
