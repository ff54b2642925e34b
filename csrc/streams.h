// What a coded step reads and writes: streams of lanes over one block of 128 elements.
//
// A stream knows the address of a block and a format, and no rule. `word` is the random bits of the
// lanes; what rounds to nearest ignores it.
#pragma once
#include "codec.h"
#include "lanes.h"

namespace ebbtide {
namespace {

constexpr int kVectors = kBlock / kLanes;

EBBTIDE_INLINE UintLanes words_at(int j, uint32_t block_word) {
  return load<UintLanes>(&kLaneConstants[size_t(j)]) ^ block_word;
}

// bfloat16 by lanes; `round` is what is added below the kept half. Numbers that could overflow, and
// those that are no numbers, go one by one.
EBBTIDE_INLINE Lanes get_bf16(const uint16_t* at) { return from_bits(load_wide(at) << 16); }
[[gnu::noinline, gnu::cold]] void put_bf16_each(uint16_t* at, Lanes x, UintLanes round) {
  for (int i = 0; i < kLanes; ++i) at[i] = float_to_bf16(x[i], round[i]);
}
EBBTIDE_INLINE bool far_from_overflow(Lanes x) {
  return all(below(magnitude(x), splat<Lanes>(0x1.FEp127f)));  // the largest bfloat16
}
EBBTIDE_INLINE void put_bf16(uint16_t* at, Lanes x, UintLanes round) {
  if (!far_from_overflow(x)) [[unlikely]]
    return put_bf16_each(at, x, round);
  store_low(at, (to_bits(x) + round) >> 16);
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
  EBBTIDE_INLINE void prefetch() const { prefetch_block(at); }
  EBBTIDE_INLINE Lanes get(int j) const { return load<Lanes>(at + j); }
  EBBTIDE_INLINE void put(int j, Lanes x, UintLanes) const { store(at + j, x); }
};

template <bool kStochastic>
struct BFloatStream {
  uint16_t* at;
  EBBTIDE_INLINE void prefetch() const { prefetch_block(at); }
  EBBTIDE_INLINE Lanes get(int j) const { return get_bf16(at + j); }
  EBBTIDE_INLINE void put(int j, Lanes x, UintLanes word) const {
    put_bf16(at + j, x, kStochastic ? word >> 16 : nearest_bf16(x));
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
  EBBTIDE_INLINE Lanes get(int j) const {
    const UintLanes high = load_wide(at + j) << 16;
    const UintLanes low = (UintLanes)load_wide(residual + j) << (16 - kBits);
    // A residual below zero carries into the sign only where the rest has been set to zero.
    return from_bits(choose(above((IntLanes)((high + low) ^ high), -1), high + low, high));
  }
  EBBTIDE_INLINE void put(int j, Lanes x, UintLanes word) const {
    if (!far_from_overflow(x)) [[unlikely]]
      return put_each(at + j, residual + j, x, word);
    UintLanes u = to_bits(x);
    if (kBits == 8) u += word >> 24;
    store_low(at + j, (u + 0x8000u) >> 16);
    store_low(residual + j, u >> (16 - kBits));
  }
  [[gnu::noinline, gnu::cold]] static void put_each(uint16_t* at, Residual* residual, Lanes x,
                                                    UintLanes word) {
    for (int i = 0; i < kLanes; ++i) {
      const Split parts = split(x[i], kBits, false, word[i] >> 24);
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

  void prefetch() const {}
  [[gnu::noinline]] Lanes get(int j) const {
    if (format == Format::kF32) return load<Lanes>(static_cast<const float*>(data) + j);
    const uint16_t* at = static_cast<const uint16_t*>(data) + j;
    const bool half = format == Format::kF16;
    if (!half) {
      if (residual_bits == 0) return get_bf16(at);
      return residual_bits == 8 ? split<8>().get(j) : split<16>().get(j);
    }
    Lanes x;
    for (int i = 0; i < kLanes; ++i) {
      x[i] = residual_bits == 0 ? f16_to_float(at[i]) : f16_join(at[i], low(j + i), residual_bits);
    }
    return x;
  }
  [[gnu::noinline]] void put(int j, Lanes x, UintLanes word) const {
    if (format == Format::kF32) return store(static_cast<float*>(data) + j, x);
    uint16_t* at = static_cast<uint16_t*>(data) + j;
    const bool half = format == Format::kF16;
    if (!half) {
      if (residual_bits == 8) return split<8>().put(j, x, word);
      if (residual_bits == 16) return split<16>().put(j, x, word);
      return put_bf16(at, x, stochastic ? word >> 16 : nearest_bf16(x));
    }
    for (int i = 0; i < kLanes; ++i) {
      if (residual_bits == 0) {
        at[i] = float_to_f16(x[i], stochastic ? word[i] >> 19 : f16_nearest_bits(x[i]));
      } else {
        const Split parts = ebbtide::split(x[i], residual_bits, true, word[i] >> 24);
        at[i] = parts.high;
        if (residual_bits == 8) static_cast<int8_t*>(residual)[j + i] = int8_t(parts.residual);
        if (residual_bits == 16) static_cast<int16_t*>(residual)[j + i] = parts.residual;
      }
    }
  }

 private:
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
