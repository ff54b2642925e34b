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
EBBTIDE_INLINE void put_bf16(uint16_t* at, Lanes x, UintLanes round) {
  const UintLanes u = to_bits(x);
  if (any((UintLanes)((u & 0x7FFFFFFFu) >= 0x7F7F0000u))) [[unlikely]] {
    for (int i = 0; i < kLanes; ++i) at[i] = float_to_bf16(x[i], round[i]);
    return;
  }
  store_low(at, (u + round) >> 16);
}
EBBTIDE_INLINE UintLanes nearest_bf16(Lanes x) { return 0x7FFFu + ((to_bits(x) >> 16) & 1u); }

struct FloatStream {
  float* at;
  EBBTIDE_INLINE Lanes get(int j) const { return load<Lanes>(at + j); }
  EBBTIDE_INLINE void put(int j, Lanes x, UintLanes) const { store(at + j, x); }
};

template <bool kStochastic>
struct BFloatStream {
  uint16_t* at;
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

  EBBTIDE_INLINE Lanes get(int j) const {
    const UintLanes high = load_wide(at + j);
    IntLanes low = load_wide(residual + j);
    low = ((high & 0x7FFFu) == 0) & (low < 0) ? IntLanes{} : low;
    return from_bits((high << 16) + ((UintLanes)low << (16 - kBits)));
  }
  EBBTIDE_INLINE void put(int j, Lanes x, UintLanes word) const {
    UintLanes u = to_bits(x);
    if (any((UintLanes)((u & 0x7FFFFFFFu) >= 0x7F7F0000u))) [[unlikely]] {
      for (int i = 0; i < kLanes; ++i) {
        const Split parts = split(x[i], kBits, false, word[i] >> 24);
        at[j + i] = parts.high;
        residual[j + i] = Residual(parts.residual);
      }
      return;
    }
    if (kBits == 8) u += word >> 24;
    store_low(at + j, (u + 0x8000u) >> 16);
    store_low(residual + j, u >> (16 - kBits));
  }
};

// A float16 parameter and the bits it cannot hold, one by one: it is rare.
struct HalfSplitStream {
  uint16_t* at;
  void* residual;
  int bits;

  Lanes get(int j) const {
    Lanes x;
    for (int i = 0; i < kLanes; ++i) {
      const int32_t low = bits == 8 ? static_cast<int8_t*>(residual)[j + i]
                                    : static_cast<int16_t*>(residual)[j + i];
      x[i] = f16_join(at[j + i], low, bits);
    }
    return x;
  }
  void put(int j, Lanes x, UintLanes word) const {
    for (int i = 0; i < kLanes; ++i) {
      const Split parts = split(x[i], bits, true, word[i] >> 24);
      at[j + i] = parts.high;
      if (bits == 8) {
        static_cast<int8_t*>(residual)[j + i] = int8_t(parts.residual);
      } else {
        static_cast<int16_t*>(residual)[j + i] = parts.residual;
      }
    }
  }
};

// Any format of 16 or 32 bits, decided at run time: for what is rare.
struct AnyStream {
  void* data;
  Format format;
  bool stochastic;

  EBBTIDE_INLINE Lanes get(int j) const {
    if (format == Format::kF32) return load<Lanes>(static_cast<const float*>(data) + j);
    const uint16_t* at = static_cast<const uint16_t*>(data) + j;
    if (format == Format::kBF16) return get_bf16(at);
    Lanes x;
    for (int i = 0; i < kLanes; ++i) x[i] = f16_to_float(at[i]);
    return x;
  }
  EBBTIDE_INLINE void put(int j, Lanes x, UintLanes word) const {
    if (format == Format::kF32) return store(static_cast<float*>(data) + j, x);
    uint16_t* at = static_cast<uint16_t*>(data) + j;
    if (format == Format::kBF16) return put_bf16(at, x, stochastic ? word >> 16 : nearest_bf16(x));
    for (int i = 0; i < kLanes; ++i) {
      at[i] = float_to_f16(x[i], stochastic ? word[i] >> 19 : f16_nearest_bits(x[i]));
    }
  }
};

}  // namespace
}  // namespace ebbtide
