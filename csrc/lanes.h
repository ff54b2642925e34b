// The arithmetic types of the kernels: double, float, and a vector of float as wide as the
// instruction set.
//
// GCC's vector extension gives + - * / and comparisons on `Lanes`; only what it lacks is here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ebbtide {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFma = true;
#else
constexpr bool kFma = false;
#endif

using Lanes = float __attribute__((vector_size(4 * kLanes)));
using HalfLanes = float __attribute__((vector_size(2 * kLanes)));
using DoubleLanes = double __attribute__((vector_size(4 * kLanes)));

template <typename V, typename S>
inline V splat(S x) {
  if constexpr (sizeof(V) == sizeof(S)) {
    return x;
  } else {
    return x - V{};  // x - 0, not x + 0: keeps the sign of -0
  }
}

template <typename V, typename T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename V, typename T>
inline void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

inline DoubleLanes widen(HalfLanes x) { return __builtin_convertvector(x, DoubleLanes); }
inline DoubleLanes widen(DoubleLanes x) { return x; }

// a·b + c: one rounding for float where the instruction set has fma, two for double always.
inline double madd(double a, double b, double c) { return a * b + c; }
inline float madd(float a, float b, float c) {
  if constexpr (kFma) return __builtin_fmaf(a, b, c);
  return a * b + c;
}
inline double sqrt(double x) { return std::sqrt(x); }
inline float sqrt(float x) { return std::sqrt(x); }

#if defined(__AVX512F__)
// maskz: the plain form reads an undefined register in g++ 12's header and warns.
inline Lanes madd(Lanes a, Lanes b, Lanes c) { return (Lanes)_mm512_fmadd_ps(a, b, c); }
inline Lanes sqrt(Lanes x) { return (Lanes)_mm512_maskz_sqrt_ps(0xFFFF, x); }
inline DoubleLanes sqrt(DoubleLanes x) { return (DoubleLanes)_mm512_maskz_sqrt_pd(0xFF, x); }
#elif defined(__AVX2__)
inline Lanes madd(Lanes a, Lanes b, Lanes c) { return (Lanes)_mm256_fmadd_ps(a, b, c); }
inline Lanes sqrt(Lanes x) { return (Lanes)_mm256_sqrt_ps(x); }
inline DoubleLanes sqrt(DoubleLanes x) { return (DoubleLanes)_mm256_sqrt_pd(x); }
#elif defined(__x86_64__)
inline Lanes madd(Lanes a, Lanes b, Lanes c) { return a * b + c; }
inline Lanes sqrt(Lanes x) { return (Lanes)_mm_sqrt_ps(x); }
inline DoubleLanes sqrt(DoubleLanes x) { return (DoubleLanes)_mm_sqrt_pd(x); }
#else
template <typename V>
inline V map(V x, auto f) {
  for (unsigned i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = f(x[i]);
  return x;
}
inline Lanes madd(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < kLanes; ++i) c[i] = madd(a[i], b[i], c[i]);
  return c;
}
inline Lanes sqrt(Lanes x) {
  return map(x, [](float y) { return std::sqrt(y); });
}
inline DoubleLanes sqrt(DoubleLanes x) {
  return map(x, [](double y) { return std::sqrt(y); });
}
#endif
inline DoubleLanes madd(DoubleLanes a, DoubleLanes b, DoubleLanes c) { return a * b + c; }

}  // namespace ebbtide
