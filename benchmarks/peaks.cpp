// What n threads do when nothing waits: multiply-adds in registers, and bytes of memory. See peaks.py, which compiles this file
// with the instructions that the kernels may use.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

constexpr long kStepsBetweenLooks = 20000;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
typedef float Floats __attribute__((vector_size(kBytes)));

/// Independent sums, enough to fill the pipelines (latency times units).
template <int kSums>
struct Sums {
  Floats sums[kSums];

  Sums() {
    for (int i = 0; i < kSums; ++i) {
      sums[i] = Floats{} + static_cast<float>(i);
    }
  }

  float total() const {
    Floats all{};
    for (const auto& sum : sums) {
      all += sum;
    }
    float found = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      found += all[lane];
    }
    return found;
  }
};

/// sums <- sums * a + b, in float32. With a and b the sums fit in AVX2's 16 registers.
struct Fma : Sums<12> {
  static constexpr int kFlops = 2 * kLanes * 12;

  Floats a;
  Floats b;

  Fma(float factor, float term) : a(Floats{} + factor), b(Floats{} + term) {}

  void step() {
    for (auto& sum : sums) {
      sum = sum * a + b;
    }
  }
};

#ifdef __AVX512BF16__
/// sums <- sums + a . b, over pairs of bfloat16.
struct Dot : Sums<16> {
  static constexpr int kFlops = 4 * kLanes * 16;

  __m512bh a;
  __m512bh b;

  Dot(float factor, float term) : a(pairs_of(factor)), b(pairs_of(term)) {}

  static __m512bh pairs_of(float value) {
    const __m512 values = _mm512_set1_ps(value);
    return _mm512_cvtne2ps_pbh(values, values);
  }

  void step() {
    for (auto& sum : sums) {
      sum = _mm512_dpbf16_ps(sum, a, b);
    }
  }
};
#endif

/// Runs work(i) on n threads that begin together; seconds from the first one's beginning to the last one's end.
template <class Work>
double together(int threads, Work work) {
  std::atomic<int> waiting{threads};
  std::vector<std::pair<Clock::time_point, Clock::time_point>> spans(threads);
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) {
    workers.emplace_back([&, i] {
      --waiting;
      while (waiting > 0) {
      }
      spans[i].first = Clock::now();
      work(i);
      spans[i].second = Clock::now();
    });
  }
  auto begin = Clock::time_point::max();
  auto end = Clock::time_point::min();
  for (int i = 0; i < threads; ++i) {
    workers[i].join();
    begin = spans[i].first < begin ? spans[i].first : begin;
    end = spans[i].second > end ? spans[i].second : end;
  }
  return std::chrono::duration<double>(end - begin).count();
}

/// GFLOP/s of the calling thread, from now on.
template <class Kernel>
double rate_for(double seconds) {
  // Volatile, so that the compiler knows no value.
  volatile float factor = 0.999F;
  volatile float term = 0.001F;
  Kernel kernel(factor, term);
  long steps = 0;
  double passed = 0;
  const auto begin = Clock::now();
  do {
    for (long step = 0; step < kStepsBetweenLooks; ++step) {
      kernel.step();
    }
    steps += kStepsBetweenLooks;
    passed = std::chrono::duration<double>(Clock::now() - begin).count();
  } while (passed < seconds);
  // Without this use the compiler would drop the computation.
  volatile float sink = kernel.total();
  (void)sink;
  return 1e-9 * Kernel::kFlops * static_cast<double>(steps) / passed;
}

/// The sum over threads.
template <class Kernel>
double rate_of(int threads, double seconds) {
  std::vector<double> rates(threads);
  together(threads, [&](int i) { rates[i] = rate_for<Kernel>(seconds); });
  double total = 0;
  for (const double rate : rates) {
    total += rate;
  }
  return total;
}

typedef int64_t Line __attribute__((vector_size(64)));

/// The lines from `first` to `last`, combined so that none is left out.
int64_t combine(const Line* first, const Line* last) {
  constexpr int kAtOnce = 4;
  Line found[kAtOnce] = {};
  for (; last - first >= kAtOnce; first += kAtOnce) {
    for (int i = 0; i < kAtOnce; ++i) {
      found[i] ^= first[i];
    }
  }
  for (; first < last; ++first) {
    found[0] ^= *first;
  }
  int64_t all = 0;
  for (const Line& line : found) {
    for (int lane = 0; lane < 8; ++lane) {
      all ^= line[lane];
    }
  }
  return all;
}

/// Writes zeros past the caches, which would read each line before they write it.
void clear(Line* first, Line* last) {
#if defined(__AVX512F__)
  for (; first < last; ++first) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(first), _mm512_setzero_si512());
  }
  _mm_sfence();
#elif defined(__x86_64__)
  for (auto* to = reinterpret_cast<__m128i*>(first); to < reinterpret_cast<__m128i*>(last); ++to) {
    _mm_stream_si128(to, _mm_setzero_si128());
  }
  _mm_sfence();
#else
  std::memset(first, 0, (last - first) * sizeof(Line));
#endif
}

}  // namespace

/// GFLOP/s of float32 multiply-adds.
extern "C" double fma_peak(int threads, double seconds) {
  return rate_of<Fma>(threads, seconds);
}

#ifdef __AVX512BF16__
/// GFLOP/s of dot products of bfloat16.
extern "C" double dot_peak(int threads, double seconds) {
  return rate_of<Dot>(threads, seconds);
}
#endif

/// Seconds to read some rows of [*, row_lines] lines of 64 bytes; each thread takes an equal part of them all.
extern "C" double read_rows(
    int threads, const void* memory, int64_t row_lines, const int64_t* rows, int64_t count) {
  std::vector<int64_t> found(threads);
  const int64_t lines = row_lines * count;
  const double seconds = together(threads, [&](int thread) {
    int64_t at = lines * thread / threads;
    const int64_t end = lines * (thread + 1) / threads;
    int64_t all = 0;
    while (at < end) {
      const int64_t within = at % row_lines;
      const int64_t length = row_lines - within < end - at ? row_lines - within : end - at;
      const Line* first =
          static_cast<const Line*>(memory) + rows[at / row_lines] * row_lines + within;
      all ^= combine(first, first + length);
      at += length;
    }
    found[thread] = all;
  });
  // Without this use the compiler would drop the reads.
  volatile int64_t sink = 0;
  for (const int64_t value : found) {
    sink = sink ^ value;
  }
  return seconds;
}

/// Seconds to overwrite `lines` lines of 64 bytes.
extern "C" double write_lines(int threads, void* memory, int64_t lines) {
  return together(threads, [&](int thread) {
    Line* all = static_cast<Line*>(memory);
    clear(all + lines * thread / threads, all + lines * (thread + 1) / threads);
  });
}
