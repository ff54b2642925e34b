// What a coded step reads and writes: streams of lanes over one block of 128 elements.
//
// A stream knows the address of a block and a format, and no rule. `word` is the random bits of the
// lanes; what rounds to nearest ignores it.
#pragma once
#include "abreast.h"
#include "codec.h"

namespace ebbtide {
namespace {

constexpr int kVectors = kBlock / kLanes;

EBBTIDE_INLINE UintLanes word_at(int j, uint32_t block_word) {
  return load<UintLanes>(&kLaneConstants[size_t(j)]) ^ block_word;
}
EBBTIDE_INLINE WideBits words_at(int j, uint32_t block_word) {
  return each_from(j, [=](int i) { return word_at(i, block_word); });
}

// bfloat16; `round` is what is added below the kept half. Numbers that could overflow, and those
// that are no numbers, go one by one.
EBBTIDE_INLINE Lanes get_bf16(const uint16_t* at) { return from_bits(load_wide(at) << 16); }
// The elements one by one, for what is rare.
struct Numbers {
  float x[kWide];
  uint32_t word[kWide];

  Numbers(const Wide& numbers, const WideBits& words) {
    store(x, numbers);
    store(word, words);
  }
};
[[gnu::noinline, gnu::cold]] void put_bf16_each(uint16_t* at, const Numbers& numbers) {
  for (int i = 0; i < kWide; ++i) at[i] = float_to_bf16(numbers.x[i], numbers.word[i]);
}
EBBTIDE_INLINE bool far_from_overflow(const Wide& x) {
  UintLanes most{};
  for (int k = 0; k < kAbreast; ++k) most = larger(most, to_bits(magnitude(x.of[k])));
  return all(below(most, 0x7F7F0000));  // the largest bfloat16
}
EBBTIDE_INLINE void put_bf16(uint16_t* at, const Wide& x, const WideBits& round) {
  if (!far_from_overflow(x)) [[unlikely]]
    return put_bf16_each(at, Numbers(x, round));
  for (int k = 0; k < kAbreast; ++k) {
    store_low(at + k * kLanes, (to_bits(x.of[k]) + round.of[k]) >> 16);
  }
}
EBBTIDE_INLINE UintLanes nearest_bf16(Lanes x) { return 0x7FFFu + ((to_bits(x) >> 16) & 1u); }

constexpr int64_t kBlocksAhead = 4;  // a block fills the window in which a core reorders

template <typename Number>
EBBTIDE_INLINE void prefetch_block(const Number* at) {
  const char* ahead = reinterpret_cast<const char*>(at + kBlocksAhead * kBlock);
  for (size_t line = 0; line < kBlock * sizeof(Number); line += 64) {
    __builtin_prefetch(ahead + line);
  }
}

struct FloatStream {
  float* at;
  void place(char* data, Format, bool) { at = reinterpret_cast<float*>(data); }
  EBBTIDE_INLINE void prefetch() const { prefetch_block(at); }
  EBBTIDE_INLINE Wide get(int j) const {
    return each_from(j, [&](int i) { return load<Lanes>(at + i); });
  }
  EBBTIDE_INLINE void put(int j, const Wide& x, const WideBits&) const { store(at + j, x); }
};

template <bool kStochastic>
struct BFloatStream {
  uint16_t* at;
  void place(char* data, Format, bool) { at = reinterpret_cast<uint16_t*>(data); }
  EBBTIDE_INLINE void prefetch() const { prefetch_block(at); }
  EBBTIDE_INLINE Wide get(int j) const {
    return each_from(j, [&](int i) { return get_bf16(at + i); });
  }
  EBBTIDE_INLINE void put(int j, const Wide& x, const WideBits& words) const {
    put_bf16(
        at + j, x,
        each([](Lanes y, UintLanes word) { return kStochastic ? word >> 16 : nearest_bf16(y); }, x,
             words));
  }
};

// A bfloat16 parameter and the bits it cannot hold.
template <int kBits>
struct SplitStream {
  using Residual = std::conditional_t<kBits == 8, int8_t, int16_t>;
  uint16_t* at;
  Residual* residual;

  EBBTIDE_INLINE void prefetch() const {
    prefetch_block(at);
    prefetch_block(residual);
  }
  EBBTIDE_INLINE Wide get(int j) const {
    const auto high_at = [&](int i) { return load_wide(at + i) << 16; };
    WideBits u;
    UintLanes carried{};
    for (int k = 0; k < kAbreast; ++k) {
      const int i = j + k * kLanes;
      const UintLanes high = high_at(i);
      u.of[k] = high + ((UintLanes)load_wide(residual + i) << (16 - kBits));
      carried |= u.of[k] ^ high;
    }
    // A residual below zero carries into the sign only where the rest has been set to zero.
    if (!all(above((IntLanes)carried, -1))) [[unlikely]] {
      for (int k = 0; k < kAbreast; ++k) {
        const UintLanes high = high_at(j + k * kLanes);
        u.of[k] = choose(above((IntLanes)(u.of[k] ^ high), -1), u.of[k], high);
      }
    }
    return each([](UintLanes x) { return from_bits(x); }, u);
  }
  EBBTIDE_INLINE void put(int j, const Wide& x, const WideBits& words) const {
    if (!far_from_overflow(x)) [[unlikely]]
      return put_each(at + j, residual + j, Numbers(x, words));
    for (int k = 0; k < kAbreast; ++k) {
      UintLanes u = to_bits(x.of[k]);
      if (kBits == 8) u += words.of[k] >> 24;
      store_low(at + j + k * kLanes, (u + 0x8000u) >> 16);
      store_low(residual + j + k * kLanes, u >> (16 - kBits));
    }
  }
  [[gnu::noinline, gnu::cold]] static void put_each(uint16_t* at, Residual* residual,
                                                    const Numbers& numbers) {
    for (int i = 0; i < kWide; ++i) {
      const Split parts = split(numbers.x[i], kBits, false, numbers.word[i] >> 24);
      at[i] = parts.high;
      residual[i] = Residual(parts.residual);
    }
  }
};

// Any format of 16 or 32 bits, with or without a residual, decided at run time: for what is rare.
// Not inlined, which would make most of the machine code of something that hardly ever runs.
struct AnyStream {
  void* data;
  Format format;
  bool stochastic;
  void* residual = nullptr;
  int residual_bits = 0;

  void place(char* to, Format as, bool rounds_stochastically) {
    data = to;
    format = as;
    stochastic = rounds_stochastically;
  }
  void prefetch() const {}
  [[gnu::noinline]] Wide get(int j) const {
    if (format == Format::kF32) return FloatStream{static_cast<float*>(data)}.get(j);
    const uint16_t* at = static_cast<const uint16_t*>(data) + j;
    if (format != Format::kF16) {
      if (residual_bits == 8) return split<8>().get(j);
      if (residual_bits == 16) return split<16>().get(j);
      return bfloat16().get(j);
    }
    float x[kWide];
    for (int i = 0; i < kWide; ++i) {
      x[i] = residual_bits == 0 ? f16_to_float(at[i]) : f16_join(at[i], low(j + i), residual_bits);
    }
    return FloatStream{x}.get(0);
  }
  [[gnu::noinline]] void put(int j, const Wide& x, const WideBits& words) const {
    if (format == Format::kF32) return FloatStream{static_cast<float*>(data)}.put(j, x, words);
    if (format != Format::kF16) {
      if (residual_bits == 8) return split<8>().put(j, x, words);
      if (residual_bits == 16) return split<16>().put(j, x, words);
      if (stochastic) return BFloatStream<true>{bfloat16().at}.put(j, x, words);
      return bfloat16().put(j, x, words);
    }
    uint16_t* at = static_cast<uint16_t*>(data) + j;
    const Numbers numbers(x, words);
    for (int i = 0; i < kWide; ++i) {
      const float number = numbers.x[i];
      const uint32_t word = numbers.word[i];
      if (residual_bits == 0) {
        at[i] = float_to_f16(number, stochastic ? word >> 19 : f16_nearest_bits(number));
      } else {
        const Split parts = ebbtide::split(number, residual_bits, true, word >> 24);
        at[i] = parts.high;
        if (residual_bits == 8) static_cast<int8_t*>(residual)[j + i] = int8_t(parts.residual);
        if (residual_bits == 16) static_cast<int16_t*>(residual)[j + i] = parts.residual;
      }
    }
  }

 private:
  BFloatStream<false> bfloat16() const { return {static_cast<uint16_t*>(data)}; }
  template <int kBits>
  SplitStream<kBits> split() const {
    return {static_cast<uint16_t*>(data),
            static_cast<typename SplitStream<kBits>::Residual*>(residual)};
  }
  int32_t low(int j) const {
    return residual_bits == 8 ? static_cast<int8_t*>(residual)[j]
                              : static_cast<int16_t*>(residual)[j];
  }
};

}  // namespace
}  // namespace ebbtide
