// A memory stream with the reads and writes of an AdamW step and next to no arithmetic: the limit
// that `ebbtide bench` holds the steps against.
#pragma once
#include <chrono>
#include <cstring>
#include <memory>

#include "parallel.h"

namespace ebbtide {

// Reads four float arrays, writes three of them, `repeats` times; returns the seconds of the
// fastest pass.
inline double memory_stream(int64_t elements, int repeats) {
  const auto make = [&] {
    auto array = std::make_unique_for_overwrite<float[]>(size_t(elements));
    std::memset(array.get(), 0, size_t(elements) * sizeof(float));
    return array;
  };
  const auto p = make(), g = make(), m = make(), v = make();
  double best = 1e300;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    Threads& pool = Threads::instance();
    pool.run(pool.count(), [&](int thread, int threads) {
      float *a = p.get(), *b = m.get(), *c = v.get();
      const float* d = g.get();
      const int64_t end = elements * (thread + 1) / threads;
      for (int64_t j = elements * thread / threads; j < end; ++j) {
        const float x = b[j] + d[j];
        c[j] += d[j];
        b[j] = x;
        a[j] += x;
      }
    });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count());
  }
  return best;
}

}  // namespace ebbtide
