// How many float32 multiply-adds n threads do when nothing waits for memory. See fma_peak.py, which compiles this file.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

// Enough independent sums to fill the pipelines (latency 4 times 2 units), few enough for AVX2's 16 registers.
constexpr int kSums = 12;
constexpr long kStepsBetweenLooks = 20000;

template <int kBytes>
struct Vector {
  typedef float type __attribute__((vector_size(kBytes)));
};

/// GFLOP/s of the calling thread, from now to the deadline.
template <int kBytes>
double rate_until(Clock::time_point deadline) {
  using Floats = typename Vector<kBytes>::type;
  constexpr int kLanes = kBytes / 4;
  // Volatile, so that the compiler knows no value.
  volatile float factor = 0.999F;
  volatile float term = 0.001F;
  const Floats a = Floats{} + factor;
  const Floats b = Floats{} + term;
  Floats sums[kSums];
  for (int i = 0; i < kSums; ++i) {
    sums[i] = a * static_cast<float>(i);
  }
  long steps = 0;
  const auto begin = Clock::now();
  auto end = begin;
  do {
    for (long step = 0; step < kStepsBetweenLooks; ++step) {
      for (int i = 0; i < kSums; ++i) {
        sums[i] = sums[i] * a + b;
      }
    }
    steps += kStepsBetweenLooks;
    end = Clock::now();
  } while (end < deadline);
  // Without this use the compiler would drop the computation.
  volatile float sink = 0;
  for (const auto& sum : sums) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sink = sink + sum[lane];
    }
  }
  const double seconds = std::chrono::duration<double>(end - begin).count();
  return 2.0 * kLanes * kSums * static_cast<double>(steps) / seconds / 1e9;
}

/// The sum over threads that begin together and end together.
template <int kBytes>
double rate_of(int threads, double seconds) {
  std::atomic<int> waiting{threads};
  std::vector<double> rates(threads);
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) {
    workers.emplace_back([&, i] {
      --waiting;
      while (waiting > 0) {
      }
      const auto length = std::chrono::duration<double>(seconds);
      rates[i] =
          rate_until<kBytes>(Clock::now() + std::chrono::duration_cast<Clock::duration>(length));
    });
  }
  double total = 0;
  for (int i = 0; i < threads; ++i) {
    workers[i].join();
    total += rates[i];
  }
  return total;
}

}  // namespace

/// GFLOP/s with vectors of `bits`; 0 stands for the widest that this file was compiled for.
extern "C" double fma_peak(int threads, int bits, double seconds) {
#ifdef __AVX512F__
  if (bits == 512 || bits == 0) {
    return rate_of<64>(threads, seconds);
  }
#endif
#ifdef __AVX__
  if (bits == 256 || bits == 512 || bits == 0) {
    return rate_of<32>(threads, seconds);
  }
#endif
  return rate_of<16>(threads, seconds);
}
