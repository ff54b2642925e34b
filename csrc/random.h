// Counter-based random bits for stochastic rounding: no state, the same whatever the threads.
//
// One hash for a block of 128 elements and 128 steps, of (seed, step / 128, salt of the parameter,
// index of the block in the whole parameter). The elements vary it by a constant of their lane, the
// steps advance it by the golden ratio: the roundings of a block, and those of an element over the
// steps, are spread evenly over [0, 1), so that their errors cancel instead of adding up. Each
// alone is uniform. src/ebbtide/codecs/dither.py is the definition.
#pragma once
#include <array>
#include <cstdint>

namespace ebbtide {

constexpr int kBlock = 128;

// The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that mixes every bit.
constexpr uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

constexpr std::array<uint32_t, kBlock> lane_constants() {
  std::array<uint32_t, kBlock> constants{};
  for (uint32_t lane = 0; lane < kBlock; ++lane) {
    uint32_t reversed = 0;
    for (int bit = 0; bit < 7; ++bit) reversed |= ((lane >> bit) & 1u) << (6 - bit);
    const uint64_t filling = mix(lane);
    const uint32_t upper = (reversed << 9) | uint32_t(filling >> 55);
    const uint32_t lower = ((lane * 85 & 127u) << 9) | uint32_t(filling & 511u);
    constants[lane] = (upper << 16) | lower;
  }
  return constants;
}
alignas(64) inline constexpr std::array<uint32_t, kBlock> kLaneConstants = lane_constants();

// The bits of one block at one step, before the lanes vary them.
struct Words {
  uint32_t param, state;
};

// The random bits of one parameter at one step.
class RowBits {
 public:
  constexpr RowBits(uint64_t seed, uint64_t step, uint64_t salt)
      : key_(mix(mix(seed) ^ mix((step >> 7) * 0xD1342543DE82EF95u) ^ salt)),
        advance_(uint32_t(step) * 0x9E376A09u) {}

  constexpr Words of(int64_t block) const {
    const uint64_t hash = mix(key_ ^ (uint64_t(block) << 1));
    return {uint32_t(hash) + advance_, uint32_t(hash >> 32) + advance_};
  }

 private:
  uint64_t key_;
  uint32_t advance_;
};

}  // namespace ebbtide
