// The little that the native tests share: checks, random data, and two thread pools.
//
// A native test runs a kernel under the sanitizers over odd shapes, against a plain loop, once with
// each pool: the results must be the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "common/numeric_types.h"
#include "common/parallel.h"

#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

namespace fastif::test {

// Runs the tasks last to first on this thread.
inline Pool reversed_pool() {
  return Pool{[](int64_t tasks, void (*task)(void*, int64_t), void* context) {
    for (int64_t i = tasks; i-- > 0;) task(context, i);
  }};
}

// Three threads, tasks dealt out in turn.
inline Pool threaded_pool() {
  return Pool{[](int64_t tasks, void (*task)(void*, int64_t), void* context) {
    std::vector<std::thread> threads;
    for (int64_t t = 0; t < 3; ++t) {
      threads.emplace_back([=] {
        for (int64_t i = t; i < tasks; i += 3) task(context, i);
      });
    }
    for (auto& thread : threads) thread.join();
  }};
}

template <class T>
std::vector<T> normal(int64_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> draw;
  std::vector<T> values(n);
  for (auto& value : values) value = T(draw(engine));
  return values;
}

// Any value as a storage type, halves by cutting digits off.
template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {uint16_t(std::bit_cast<uint32_t>(x) >> 16)};
  } else if constexpr (std::is_same_v<T, Half>) {
    const uint32_t bits = std::bit_cast<uint32_t>(x * 0x1p-112f);
    return {uint16_t((bits >> 16 & 0x8000u) | (bits >> 13 & 0x7fffu))};
  } else {
    return T(x);
  }
}
template <class T>
std::vector<T> random_values(int64_t n, unsigned seed) {
  std::vector<T> values(n);
  const auto floats = normal<float>(n, seed);
  for (int64_t i = 0; i < n; ++i) values[i] = from_float<T>(floats[i]);
  return values;
}

inline bool close(double got, double want, double tolerance) {
  return std::abs(got - want) <= tolerance * (1 + std::abs(want));
}

}  // namespace fastif::test
