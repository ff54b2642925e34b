// The arithmetic types of the kernels: double, float, and a vector of float as wide as the
// instruction set.
//
// GCC's vector extension gives + - * / and comparisons on `Lanes`; only what it lacks is here.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
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
// The rules and codecs are used by many kernels, so many that g++ would call them: in one loop of
// float32 that costs 40 % (docs/log.md).
#define EBBTIDE_INLINE [[gnu::always_inline]] inline

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFma = true;
#else
constexpr bool kFma = false;
#endif

using Lanes = float __attribute__((vector_size(4 * kLanes)));
using HalfLanes = float __attribute__((vector_size(2 * kLanes)));
using DoubleLanes = double __attribute__((vector_size(4 * kLanes)));
using IntLanes = int32_t __attribute__((vector_size(4 * kLanes)));
using UintLanes = uint32_t __attribute__((vector_size(4 * kLanes)));
using Shorts = int16_t __attribute__((vector_size(4 * kLanes)));  // of two vectors of lanes

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

// a where c holds, else b; by element where c compares vectors.
template <typename C, typename V>
EBBTIDE_INLINE V pick(const C& c, const V& a, const V& b) {
  return c ? a : b;
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

// What the codecs need: bits of floats, conversions, whole numbers of 8 and 16 bits in memory,
// maxima. Without a name, so that no other instruction set's object can lend its code.
namespace {

EBBTIDE_INLINE UintLanes to_bits(Lanes x) { return (UintLanes)x; }
EBBTIDE_INLINE Lanes from_bits(UintLanes x) { return (Lanes)x; }
EBBTIDE_INLINE Lanes infinity() { return splat<Lanes>(__builtin_inff()); }
EBBTIDE_INLINE Lanes magnitude(Lanes x) { return from_bits(to_bits(x) & 0x7FFFFFFFu); }
EBBTIDE_INLINE Lanes to_float(IntLanes x) { return __builtin_convertvector(x, Lanes); }
EBBTIDE_INLINE IntLanes truncate(Lanes x) { return __builtin_convertvector(x, IntLanes); }
EBBTIDE_INLINE UintLanes splat_bits(uint32_t x) { return UintLanes{} + x; }

EBBTIDE_INLINE UintLanes larger(UintLanes a, UintLanes b) { return a > b ? a : b; }
EBBTIDE_INLINE UintLanes smaller(UintLanes a, UintLanes b) { return a < b ? a : b; }

#if defined(__AVX512F__)
EBBTIDE_INLINE UintLanes load_wide(const uint8_t* at) {
  return (UintLanes)_mm512_maskz_cvtepu8_epi32(
      0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
EBBTIDE_INLINE IntLanes load_wide(const int8_t* at) {
  return (IntLanes)_mm512_maskz_cvtepi8_epi32(
      0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
EBBTIDE_INLINE UintLanes load_wide(const uint16_t* at) {
  return (UintLanes)_mm512_maskz_cvtepu16_epi32(
      0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
EBBTIDE_INLINE IntLanes load_wide(const int16_t* at) {
  return (IntLanes)_mm512_maskz_cvtepi16_epi32(
      0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
// The low bits of each lane.
EBBTIDE_INLINE void store_low(void* to, UintLanes x, int16_t) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)x));
}
EBBTIDE_INLINE void store_low(void* to, UintLanes x, int8_t) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)x));
}
// `narrow` packs two vectors in an order of its own, `store_bytes` four in theirs: the packs work
// within 16 bytes, the permutation puts them in order.
EBBTIDE_INLINE __m512i in_order(__m512i x) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_maskz_permutexvar_epi32(0xFFFF, order, x);
}
EBBTIDE_INLINE Shorts narrow(IntLanes a, IntLanes b) {
  return (Shorts)_mm512_packs_epi32((__m512i)a, (__m512i)b);
}
EBBTIDE_INLINE void store_bytes(uint8_t* to, Shorts a, Shorts b) {
  _mm512_storeu_si512(to, in_order(_mm512_packus_epi16((__m512i)a, (__m512i)b)));
}
EBBTIDE_INLINE void store_bytes(int8_t* to, Shorts a, Shorts b) {
  _mm512_storeu_si512(to, in_order(_mm512_packs_epi16((__m512i)a, (__m512i)b)));
}
#elif defined(__AVX2__)
EBBTIDE_INLINE UintLanes load_wide(const uint8_t* at) {
  return (UintLanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
}
EBBTIDE_INLINE IntLanes load_wide(const int8_t* at) {
  return (IntLanes)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
}
EBBTIDE_INLINE UintLanes load_wide(const uint16_t* at) {
  return (UintLanes)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
EBBTIDE_INLINE IntLanes load_wide(const int16_t* at) {
  return (IntLanes)_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
// The low bits of each lane.
EBBTIDE_INLINE void store_low(void* to, UintLanes x, int16_t) {
  const __m256i packed = _mm256_packus_epi32((__m256i)(x & 0xFFFFu), (__m256i)(x & 0xFFFFu));
  _mm_storeu_si128(static_cast<__m128i*>(to),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
EBBTIDE_INLINE void store_low(void* to, UintLanes x, int8_t) {
  const __m256i first = _mm256_set1_epi32(0x0C080400);  // the lowest byte of each lane
  const __m256i order = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
  const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8((__m256i)x, first), order);
  _mm_storel_epi64(static_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
EBBTIDE_INLINE __m256i in_order(__m256i x) {
  return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
EBBTIDE_INLINE Shorts narrow(IntLanes a, IntLanes b) {
  return (Shorts)_mm256_packs_epi32((__m256i)a, (__m256i)b);
}
EBBTIDE_INLINE void store_bytes(uint8_t* to, Shorts a, Shorts b) {
  const __m256i bytes = in_order(_mm256_packus_epi16((__m256i)a, (__m256i)b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
}
EBBTIDE_INLINE void store_bytes(int8_t* to, Shorts a, Shorts b) {
  const __m256i bytes = in_order(_mm256_packs_epi16((__m256i)a, (__m256i)b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
}
#else
template <typename Number>
EBBTIDE_INLINE auto load_wide(const Number* at) {
  std::conditional_t<std::is_signed_v<Number>, IntLanes, UintLanes> x;
  for (int i = 0; i < kLanes; ++i) x[i] = at[i];
  return x;
}
// The low bits of each lane.
template <typename Number>
EBBTIDE_INLINE void store_low(void* to, UintLanes x, Number) {
  for (int i = 0; i < kLanes; ++i) static_cast<Number*>(to)[i] = Number(x[i]);
}
EBBTIDE_INLINE Shorts narrow(IntLanes a, IntLanes b) {
  Shorts x;
  for (int i = 0; i < 2 * kLanes; ++i) x[i] = int16_t((i < kLanes ? a : b)[i % kLanes]);
  return x;
}
template <typename Number>
EBBTIDE_INLINE void store_bytes(Number* to, Shorts a, Shorts b) {
  for (int i = 0; i < 4 * kLanes; ++i) {
    to[i] = Number((i < 2 * kLanes ? a : b)[i % (2 * kLanes)]);
  }
}
EBBTIDE_INLINE uint32_t largest(UintLanes x) {
  uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}
EBBTIDE_INLINE uint32_t smallest(UintLanes x) { return ~largest(~x); }
EBBTIDE_INLINE uint32_t total(UintLanes x) {
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}
#endif

// The codes of four vectors of numbers below 2^15: of what they exceed base by, half up to
// 2·coarse, all but coarse beyond; none of what lies below base.
EBBTIDE_INLINE Shorts codes_of(Shorts x, int16_t base, int16_t coarse) {
  const Shorts floor = Shorts{} + base, above = (x > floor ? x : floor) - base;
  const Shorts half = above >> 1, rest = above - coarse;
  return half > rest ? half : rest;
}
EBBTIDE_INLINE void store_codes(uint8_t* to, const UintLanes* x, uint32_t base, uint32_t coarse) {
  const Shorts low = narrow((IntLanes)x[0], (IntLanes)x[1]);
  const Shorts high = narrow((IntLanes)x[2], (IntLanes)x[3]);
  store_bytes(to, codes_of(low, int16_t(base), int16_t(coarse)),
              codes_of(high, int16_t(base), int16_t(coarse)));
}
// Four vectors by 2^16, rounded down.
EBBTIDE_INLINE void store_upper(int8_t* to, const IntLanes* x) {
  store_bytes(to, narrow(x[0] >> 16, x[1] >> 16), narrow(x[2] >> 16, x[3] >> 16));
}

// What a comparison by lanes says, in the form that is cheapest to use: `where` gives zero and
// `choose` something else for the other lanes, and `smaller` leaves a as it is there.
#if defined(__AVX512F__)
using Mask = __mmask16;
EBBTIDE_INLINE Mask below(Lanes a, Lanes b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
}
EBBTIDE_INLINE Mask nonzero(UintLanes x) { return _mm512_test_epi32_mask((__m512i)x, (__m512i)x); }
EBBTIDE_INLINE Mask above(IntLanes x, int32_t bound) {
  return _mm512_cmpgt_epi32_mask((__m512i)x, _mm512_set1_epi32(bound));
}
EBBTIDE_INLINE Mask below(UintLanes x, int32_t bound) {
  return _mm512_cmplt_epi32_mask((__m512i)x, _mm512_set1_epi32(bound));
}
EBBTIDE_INLINE bool all(Mask mask) { return mask == 0xFFFF; }
EBBTIDE_INLINE int count(Mask mask) { return __builtin_popcount(mask); }
template <typename V>
EBBTIDE_INLINE V where(Mask mask, V x) {
  return (V)_mm512_maskz_mov_epi32(mask, (__m512i)x);
}
template <typename V>
EBBTIDE_INLINE V choose(Mask mask, V x, V otherwise) {
  return (V)_mm512_mask_mov_epi32((__m512i)otherwise, mask, (__m512i)x);
}
EBBTIDE_INLINE UintLanes smaller(Mask mask, UintLanes a, UintLanes b) {
  return (UintLanes)_mm512_mask_min_epu32((__m512i)a, mask, (__m512i)a, (__m512i)b);
}
#else
using Mask = IntLanes;
EBBTIDE_INLINE Mask below(Lanes a, Lanes b) { return a < b; }
EBBTIDE_INLINE Mask nonzero(UintLanes x) { return x != 0; }
EBBTIDE_INLINE Mask above(IntLanes x, int32_t bound) { return x > bound; }
EBBTIDE_INLINE Mask below(UintLanes x, int32_t bound) { return (IntLanes)x < bound; }
#if defined(__AVX2__)
EBBTIDE_INLINE bool all(Mask mask) { return _mm256_movemask_ps((__m256)mask) == 0xFF; }
#else
EBBTIDE_INLINE bool all(Mask mask) { return largest((UintLanes)~mask) == 0; }
#endif
template <typename V>
EBBTIDE_INLINE V where(Mask mask, V x) {
  return (V)((IntLanes)x & mask);
}
template <typename V>
EBBTIDE_INLINE V choose(Mask mask, V x, V otherwise) {
  return mask ? x : otherwise;
}
EBBTIDE_INLINE UintLanes smaller(Mask mask, UintLanes a, UintLanes b) {
  return smaller(a, b | (UintLanes)~mask);
}
#endif

template <typename Number>
EBBTIDE_INLINE void store_low(Number* to, UintLanes x) {
  store_low(to, x, std::make_signed_t<Number>());
}

#if defined(__AVX2__)
// Halves, quarters, ... are combined; the order of elements does not matter to any of the three.
template <__m256i (*kWide)(__m256i, __m256i), __m128i (*kNarrow)(__m128i, __m128i)>
EBBTIDE_INLINE uint32_t fold(UintLanes x) {
#if defined(__AVX512F__)
  const __m256i wide = kWide((__m256i)__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                             (__m256i)__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const __m256i wide = (__m256i)x;
#endif
  __m128i half = kNarrow(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  half = kNarrow(half, _mm_shuffle_epi32(half, 0x4E));
  return uint32_t(_mm_cvtsi128_si32(kNarrow(half, _mm_shuffle_epi32(half, 0xB1))));
}
EBBTIDE_INLINE uint32_t largest(UintLanes x) { return fold<_mm256_max_epu32, _mm_max_epu32>(x); }
EBBTIDE_INLINE uint32_t smallest(UintLanes x) { return fold<_mm256_min_epu32, _mm_min_epu32>(x); }
EBBTIDE_INLINE uint32_t total(UintLanes x) { return fold<_mm256_add_epi32, _mm_add_epi32>(x); }
#endif
#if !defined(__AVX512F__)
EBBTIDE_INLINE int count(Mask mask) { return int(total((UintLanes)-mask)); }
#endif

// The largest lanes of three vectors.
struct Maxima {
  uint32_t a, b, c;
};
EBBTIDE_INLINE Maxima maxima(UintLanes a, UintLanes b, UintLanes c) {
#if defined(__AVX512F__)
  // Quarters: of a and b side by side, then of all three; lanes within a quarter last.
  const auto halves = [](UintLanes x, UintLanes y) {
    return larger(
        __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
        __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                31));
  };
  const UintLanes ab = halves(a, b), cc = halves(c, c);
  UintLanes most = larger(
      __builtin_shufflevector(ab, cc, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
      __builtin_shufflevector(ab, cc, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
  most = larger(most,
                (UintLanes)_mm512_maskz_shuffle_epi32(0xFFFF, (__m512i)most, _MM_PERM_ENUM(0x4E)));
  most = larger(most,
                (UintLanes)_mm512_maskz_shuffle_epi32(0xFFFF, (__m512i)most, _MM_PERM_ENUM(0xB1)));
  return {most[0], most[4], most[8]};
#else
  return {largest(a), largest(b), largest(c)};
#endif
}

}  // namespace

}  // namespace ebbtide
