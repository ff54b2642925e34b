// Several vectors of lanes computed side by side, operation by operation: what one waits for, the
// others use (docs/log.md), and what is checked of one is checked of all at once.
#pragma once
#include "lanes.h"

namespace ebbtide {

#if defined(__AVX512F__)
constexpr int kAbreast = 4;
#else
constexpr int kAbreast = 2;  // sixteen registers hold no more
#endif
constexpr int kWide = kAbreast * kLanes;  // elements

template <typename V>
struct Abreast {
  V of[kAbreast];
};
using Wide = Abreast<Lanes>;
using WideBits = Abreast<UintLanes>;

template <typename T>
constexpr bool kIsAbreast = false;
template <typename V>
constexpr bool kIsAbreast<Abreast<V>> = true;

// The k-th vector, or what is the same for all.
template <typename T>
EBBTIDE_INLINE const auto& part(const T& x, int k) {
  if constexpr (kIsAbreast<T>) {
    return x.of[k];
  } else {
    return x;
  }
}

// f of the k-th parts, for each k.
template <typename F, typename... T>
EBBTIDE_INLINE auto each(F f, const T&... x) {
  Abreast<decltype(f(part(x, 0)...))> y;
#pragma GCC unroll 4
  for (int k = 0; k < kAbreast; ++k) y.of[k] = f(part(x, k)...);
  return y;
}
// f of the place of each vector in memory.
template <typename F>
EBBTIDE_INLINE auto each_from(int j, F f) {
  Abreast<decltype(f(j))> y;
#pragma GCC unroll 4
  for (int k = 0; k < kAbreast; ++k) y.of[k] = f(j + k * kLanes);
  return y;
}

template <typename A, typename B>
concept OneAbreast = kIsAbreast<A> || kIsAbreast<B>;

template <typename A, typename B>
  requires OneAbreast<A, B>
EBBTIDE_INLINE auto operator+(const A& a, const B& b) {
  return each([](const auto& x, const auto& y) { return x + y; }, a, b);
}
template <typename A, typename B>
  requires OneAbreast<A, B>
EBBTIDE_INLINE auto operator-(const A& a, const B& b) {
  return each([](const auto& x, const auto& y) { return x - y; }, a, b);
}
template <typename A, typename B>
  requires OneAbreast<A, B>
EBBTIDE_INLINE auto operator*(const A& a, const B& b) {
  return each([](const auto& x, const auto& y) { return x * y; }, a, b);
}
template <typename A, typename B>
  requires OneAbreast<A, B>
EBBTIDE_INLINE auto operator/(const A& a, const B& b) {
  return each([](const auto& x, const auto& y) { return x / y; }, a, b);
}
template <typename A, typename B>
  requires OneAbreast<A, B>
EBBTIDE_INLINE auto operator<(const A& a, const B& b) {
  return each([](const auto& x, const auto& y) { return x < y; }, a, b);
}
template <typename A, typename B>
  requires OneAbreast<A, B>
EBBTIDE_INLINE auto operator==(const A& a, const B& b) {
  return each([](const auto& x, const auto& y) { return x == y; }, a, b);
}
template <typename C, typename V>
EBBTIDE_INLINE Abreast<V> pick(const Abreast<C>& c, const Abreast<V>& a, const Abreast<V>& b) {
  return each([](const auto& k, const auto& x, const auto& y) { return pick(k, x, y); }, c, a, b);
}
EBBTIDE_INLINE Wide madd(const Wide& a, const Wide& b, const Wide& c) {
  return each([](Lanes x, Lanes y, Lanes z) { return madd(x, y, z); }, a, b, c);
}
EBBTIDE_INLINE Wide sqrt(const Wide& x) {
  return each([](Lanes y) { return sqrt(y); }, x);
}

template <typename T, typename V>
EBBTIDE_INLINE void store(T* to, const Abreast<V>& x) {
  for (int k = 0; k < kAbreast; ++k) store(to + k * kLanes, x.of[k]);
}

}  // namespace ebbtide
